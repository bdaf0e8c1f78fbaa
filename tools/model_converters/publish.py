"""Publish a checkpoint: the weights alone, with a hash in the file's name."""

import argparse
import os.path as osp

import wsbcn_mm  # noqa: F401  registers what makes loading safe
from wsbcn_mm.engine.checkpoint import publish, read_checkpoint
from wsbcn_mm.engine.command_line import run


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='the trained checkpoint')
    parser.add_argument(
        'out', help='the file to write, to whose name a hash is added'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    checkpoint = read_checkpoint(args.checkpoint)
    path = publish(checkpoint, args.out)
    left = sorted(set(checkpoint) - {'state_dict', 'meta'})
    print(
        f'Wrote {path}: {osp.getsize(path) / 2**20:.1f} MiB of '
        f'{osp.getsize(args.checkpoint) / 2**20:.1f}. Left out: '
        f'{", ".join(left) or "nothing"}.'
    )


if __name__ == '__main__':
    run(main)
