"""Attack the package as a hostile user and a flaky cluster would.

Runs the tools for real on digit scenes, kills them, fills their disk, hands
them broken files and mistaken configs, and counts what survived.

    python tools/hard_use/run.py                          # a few minutes
    python tools/hard_use/run.py --only checkpoint        # some of it
    python tools/hard_use/run.py --scale 10 --out docs/hard_use.md
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

from hard_use import checkpoints, data, interruptions  # noqa: E402, F401
from hard_use.bench import ATTACKS, Bench, make_scenes  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default='')
    parser.add_argument('--scale', type=int, default=1)
    parser.add_argument('--folder')
    return parser.parse_args()


def main():
    args = parse_args()
    folder = Path(args.folder or tempfile.mkdtemp())
    scenes = make_scenes(folder / 'scenes')
    for attack in ATTACKS:
        if args.only in f'{attack.group} {attack.title} {attack.run.__name__}':
            print(f'{attack.group}: {attack.title}', flush=True)
            bench = Bench(
                folder / attack.run.__name__,
                scenes,
                args.scale,
                lambda line: print(line, flush=True),
            )
            begin = time.monotonic()
            attack.run(bench)
            print(
                len(bench.tried),
                len(bench.lost),
                f'{time.monotonic() - begin:.0f} s',
                flush=True,
            )
            for what, why in bench.lost:
                print('---', what, '\n', why, flush=True)


if __name__ == '__main__':
    main()
