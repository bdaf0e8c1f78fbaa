"""Make a backbone checkpoint out of a trained classifier.

A detector or a segmentor starts from it by
``backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=...))``.
"""

import argparse

import wsbcn_mm  # noqa: F401  registers what makes loading safe
from wsbcn_mm.engine.checkpoint import publish, read_checkpoint, select
from wsbcn_mm.engine.command_line import UsageError, run


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='the trained classifier')
    parser.add_argument(
        'out', help='the file to write, to whose name a hash is added'
    )
    parser.add_argument(
        '--prefix',
        default='backbone.',
        help="what the backbone's keys begin with; '' for those of "
        'torchvision, which have none',
    )
    return parser.parse_args()


def main():
    args = parse_args()
    checkpoint = read_checkpoint(args.checkpoint)
    state = checkpoint['state_dict']
    backbone = select(state, args.prefix)
    if not backbone:
        heads = sorted({key.split('.')[0] for key in state})
        raise UsageError(
            f'no key begins with {args.prefix!r}; this checkpoint has '
            f'{", ".join(heads)}. Name the backbone with --prefix.'
        )
    path = publish(dict(checkpoint, state_dict=backbone), args.out)
    print(
        f'Wrote {path}: {len(backbone)} tensors of the backbone; '
        f'{len(state) - len(backbone)} others were left out.'
    )


if __name__ == '__main__':
    run(main)
