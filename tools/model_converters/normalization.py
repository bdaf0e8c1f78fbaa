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
from wsbcn_mm.engine.checkpoint import (
    load_all_weights,
    publish,
    read_checkpoint,
    read_config,
)
from wsbcn_mm.engine.command_line import UsageError, run
from wsbcn_mm.engine.mistakes import mistakes_explained


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
    with mistakes_explained(cfg):
        model = MODELS.build(cfg.model)
    missing, unexpected = load_all_weights(
        model, checkpoint['state_dict'], repr(args.checkpoint), strict=False
    )
    own = len(model.state_dict())
    if len(missing) > own / 2:
        raise UsageError(
            f'{args.checkpoint!r} is not of the network in {args.config!r}: '
            f'{len(missing)} of its {own} tensors are missing, such as '
            f'{missing[0]}'
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
