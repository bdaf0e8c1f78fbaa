"""Convert a checkpoint to the normalization that a config has.

The model of CONFIG loads CHECKPOINT, as training would by ``load_from``, and
what came of it is written: BN, GN, MABN, BGN or the authors' BCN become what
the config says. The report says what was taken and what was left, and the
warnings where the outputs are not those of the checkpoint.
"""

import argparse

import torch
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import get_state_dict

import wsbcn_mm  # noqa: F401  registers the layers
from wsbcn_mm.engine.checkpoint import publish, read_checkpoint, read_config
from wsbcn_mm.engine.command_line import UsageError, run
from wsbcn_mm.layers.checkpoint_layouts import authors_weight_function


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a config with the new normalization')
    parser.add_argument('checkpoint', help='the checkpoint to convert')
    parser.add_argument(
        'out', help='the file to write, to whose name a hash is added'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = read_config(args.config)
    checkpoint = read_checkpoint(args.checkpoint)
    model = MODELS.build(cfg.model)
    try:
        missing, unexpected = model.load_state_dict(
            checkpoint['state_dict'], strict=False
        )
    except RuntimeError as error:  # sizes that do not match
        raise UsageError(
            f'{args.checkpoint!r} is not of the network in {args.config!r}: '
            f'{error}'
        ) from error
    own = len(model.state_dict())
    if len(missing) > own / 2:
        advice = ''
        if authors_weight_function(checkpoint['state_dict']):
            advice = (
                '. It is of the code of BCN + WS, whose names authors.py '
                'translates'
            )
        raise UsageError(
            f'{args.checkpoint!r} is not of the network in {args.config!r}: '
            f'{len(missing)} of its {own} tensors are missing, such as '
            f'{missing[0]}{advice}'
        )
    path = publish(
        dict(checkpoint, state_dict=get_state_dict(model)), args.out
    )
    for title, keys in (
        ('Missing, so left as initialized', missing),
        ('Of no use, so left out', unexpected),
    ):
        print(f'{title}: {len(keys)}')
        for key in keys:
            print(f'  {key}')
    print(f'Wrote {path}')


if __name__ == '__main__':
    torch.manual_seed(0)
    run(main)
