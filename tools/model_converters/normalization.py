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
    with mistakes_explained(cfg):
        model = MODELS.build(cfg.model)
    state = checkpoint['state_dict']
    own = len(model.state_dict())
    try:
        missing, unexpected = load_all_weights(
            model, state, repr(args.checkpoint), strict=False
        )
        if len(missing) > own / 2:
            raise UsageError(
                f'{args.checkpoint!r} is of another network than that in '
                f'{args.config!r}: {len(missing)} of its {own} tensors are '
                f'missing, such as {missing[0]}.'
            )
    except UsageError as error:
        if not authors_weight_function(state):
            raise
        raise UsageError(
            f'{error} It is of the code of BCN + WS, whose names '
            'tools/model_converters/authors.py translates.'
        ) from error
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
