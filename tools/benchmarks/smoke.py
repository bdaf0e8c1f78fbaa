"""Are the Triton kernels right on this GPU, and are their sizes well chosen?

What a first contact with a GPU asks before anything is timed. Every line is
written to smoke.jsonl as soon as it is known, and no failure stops the rest
but a fault that CUDA does not recover from.

    python tools/benchmarks/smoke.py             # check, repeat
    python tools/benchmarks/smoke.py large tune  # the others

Without a GPU, Triton's interpreter takes small maps:

    TRITON_INTERPRET=1 python tools/benchmarks/smoke.py --device cpu --small
"""

import json
import os
import sys
import time
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from _harness import (
    REPLAYS,
    begin,
    environment,
    parser,
    seconds,
    without_launching,
)

from wsbcn_mm import BCN
from wsbcn_mm.functional import kernels
from wsbcn_mm.functional.kernels import fused, launch, plain

sys.path.append(str(Path(__file__).parents[2] / 'tests' / 'test_functional'))
import kernel_parity  # noqa: E402
import parity  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [
    (1, 256, 200, 304),
    (1, 1024, 50, 76),
    (2, 2048, 25, 38),
    (512, 256, 7, 7),
    (128, 256, 14, 14),
]
SMALL_SHAPES = [(3, 64, 5, 7), (1, 64, 48, 48)]


class Log:
    """What is known, a line each, on the screen and on the disk at once."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open('a')
        self._start = time.time()
        self.failures = 0

    def __call__(self, step: str, failed: bool = False, **fields) -> None:
        self.failures += failed
        elapsed = round(time.time() - self._start, 1)
        fields = dict(t=elapsed, step=step, **fields)
        if failed:
            fields['FAILED'] = True
        line = json.dumps(fields, default=str)
        print(line, flush=True)
        self._file.write(line + '\n')
        self._file.flush()
        os.fsync(self._file.fileno())


def check(args, log) -> None:
    """Compare every function with the definition, and say the margins."""
    for dtype in DTYPES:
        margins = {}

        def record(name, actual, expected, bound, margins=margins):
            if actual.shape != expected.shape:
                margins[name] = float('inf')
                return
            ratio = (actual.double().cpu() - expected).abs() / bound
            worst = float(ratio.nan_to_num(torch.inf).max())
            margins[name] = round(max(margins.get(name, 0), worst), 3)

        start = time.time()
        with mock.patch.object(parity, '_close', record):
            for shape in ((2, 6, 5, 7), (1, 2, 67, 71)):
                for layout in LAYOUTS:
                    torch.manual_seed(0)
                    x, grad = (
                        torch.randn(shape)
                        .to(args.device, dtype)
                        .contiguous(memory_format=layout)
                        for _ in range(2)
                    )
                    parity.check(fused, 2 * x + 1, grad)
        bad = [name for name, ratio in margins.items() if ratio > 1]
        log(
            'check',
            failed=bool(bad),
            dtype=dtype,
            seconds=round(time.time() - start, 1),
            bad=bad,
            margins=margins,
        )
    for dtype in DTYPES:
        start = time.time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            chosen = kernels.select(
                torch.ones(1, 2, 3, device=args.device, dtype=dtype)
            )
        log(
            'first use',
            failed=bool(caught),
            dtype=dtype,
            seconds=round(time.time() - start, 1),
            chosen=chosen.__name__.split('.')[-1],
            warnings=[str(w.message) for w in caught],
        )
    kernel_parity.check_overflow('fused', args.device)
    kernel_parity.check_many_tiles(args.device)
    log('overflow, many tiles')


def training_step(norm, x, grad):
    y = norm(x)
    return [y, *torch.autograd.grad(y, (x, *norm.parameters()), grad)]


def repeat(args, log) -> None:
    """Compare full sizes with float64, three times: a race shows as a change.

    Norms of the errors are over those of the results.
    """
    for shape in SMALL_SHAPES if args.small else SHAPES:
        for dtype, layout in zip(DTYPES, LAYOUTS):
            for estimate in (True, False):
                torch.manual_seed(0)
                x = torch.randn(shape, device=args.device) * 2 + 1
                x = x.to(dtype).contiguous(memory_format=layout)
                grad = torch.randn_like(x)
                results = []
                for module in (fused, fused, fused, plain):
                    norm = BCN(shape[1], momentum=0.1, estimate=estimate)
                    norm.to(args.device)
                    given = x, grad
                    if module is plain:
                        norm, given = (
                            norm.double(),
                            (x.double(), grad.double()),
                        )
                    leaf = given[0].detach().requires_grad_()
                    with kernels.use(args.device, module):
                        step = training_step(norm, leaf, given[1])
                    results.append([*step, *norm.buffers()])
                *ours, expected = results
                same = all(
                    torch.equal(a, b)
                    for others in ours[1:]
                    for a, b in zip(ours[0], others)
                )
                errors = [
                    float(
                        (a.double() - b).norm()
                        / b.double().norm().clamp(1e-30)
                    )
                    for a, b in zip(ours[0], expected)
                ]
                most = 1e-3 if dtype == torch.float32 else 1e-2
                log(
                    'repeat',
                    failed=not same or not max(errors) < most,
                    shape=shape,
                    dtype=dtype,
                    layout=layout,
                    estimate=estimate,
                    same=same,
                    errors=[f'{error:.1e}' for error in errors],
                )


def large(args, log) -> None:
    """Take more elements than an int32 counts, in both layouts: 4.6 GB."""
    shape = (2, 4, 30, 30) if args.small else (2, 1152, 1000, 1000)
    for layout in LAYOUTS:
        x = torch.empty(
            shape,
            device=args.device,
            dtype=torch.float16,
            memory_format=layout,
        ).normal_()
        mean, var = fused.moments(x)
        one = torch.ones_like(mean)
        wide = x[1, -2:].double()  # the last channels
        centered = wide - mean[1, -2:, None, None]
        errors = dict(
            mean=mean[1, -2:] - wide.mean((1, 2)),
            var=var[1, -2:] - wide.var((1, 2), correction=0),
            affine=fused.affine(x, mean, one, one)[1, -2:] - centered - 1,
            input_grad=fused.input_grad(x, x, mean, one, one, one)[1, -2:]
            - (wide + centered + 1),
        )
        errors = {name: float(e.abs().max()) for name, e in errors.items()}
        # Half of float16's last digit, of numbers up to 16.
        log(
            'large',
            failed=not max(errors.values()) < 1e-2,
            layout=layout,
            errors=errors,
        )


def tune(args, log) -> None:
    """Time a step with other sizes of tiles and numbers of warps."""
    passes = {'_tile_moments', '_affine', '_tile_sums', '_input_grad'}
    coefficients = {'_forward', '_input_coefficients', '_join_moments'}
    for label, settings in {
        'as it is': {},
        'tiles of 8192, 8 warps': dict(elements=8192, of_passes=8),
        'tiles of 2048': dict(elements=2048),
        'passes: 8 warps': dict(of_passes=8),
        'coefficients: 1 warp': dict(of_coefficients=1),
        'coefficients: 8 warps': dict(of_coefficients=8),
        'whole backward: from 1 warp': dict(of_whole=1),
        'whole backward: from 2 warps': dict(of_whole=2),
    }.items():
        with _sizes(passes, coefficients, **settings):
            times = {}
            for dtype in (torch.float32, torch.float16):
                for shape in SMALL_SHAPES if args.small else SHAPES:
                    x = torch.randn(shape, device=args.device).to(dtype)
                    leaf, grad = x.requires_grad_(), torch.randn_like(x)
                    norm = BCN(shape[1]).to(args.device)
                    times[f'{shape} {dtype}'] = _microseconds(
                        lambda norm=norm, x=leaf, g=grad: training_step(
                            norm, x, g
                        ),
                        args,
                    )
        log('tune', sizes=label, us=times)


def _sizes(
    passes, coefficients, elements=None, of_passes=None,
    of_coefficients=None, of_whole=4,
):  # fmt: skip
    """Let kernels be planned anew with such sizes, for a while."""
    init = launch.Launch.__init__

    def planned(self, kernel, programs, numbers, constants, num_warps=4):
        name = kernel.jit.fn.__name__
        if name in passes:
            num_warps = of_passes or num_warps
        if name in coefficients:
            num_warps = of_coefficients or num_warps
        init(self, kernel, programs, numbers, constants, num_warps)

    stack = ExitStack()
    for target, name, value in (
        (launch.Launch, '__init__', planned),
        (fused, '_ELEMENTS', elements or fused._ELEMENTS),
        (fused, '_warps', lambda n: max(of_whole, n // 512)),
        (fused, '_passes', launch.planned(fused._Passes)),
        (fused, '_forward', launch.planned(fused._Forward)),
        (fused, '_backward', launch.planned(fused._Backward)),
    ):
        stack.enter_context(mock.patch.object(target, name, value))
    return stack


def _microseconds(function, args):
    with kernels.use(args.device, fused):
        try:
            if args.device != 'cuda':
                return round(seconds({0: function}, args)[0] * 1e6, 1)
            replays = without_launching(function)
            time = seconds({0: replays}, args, on_gpu=True)[0] / REPLAYS
            return round(time * 1e6, 1)
        except Exception as error:  # such a size may not fit
            return f'{type(error).__name__}: {error}'[:80]


STEPS = dict(check=check, repeat=repeat, large=large, tune=tune)


def main(argv=None):
    options = parser(__doc__.split('\n')[0], 'smoke')
    options.add_argument(
        'steps', nargs='*', default=['check', 'repeat'], metavar='step',
        help=f'of {", ".join(STEPS)}',
    )  # fmt: skip
    args = options.parse_args(argv)
    for name in args.steps:
        if name not in STEPS:
            options.error(f'{name}: expected steps of {", ".join(STEPS)}')
    begin(args)
    log = Log(args.out / 'smoke.jsonl')
    log('environment', **environment(args.device))
    for name in args.steps:
        start = time.time()
        try:
            STEPS[name](args, log)
        except Exception as error:
            where = traceback.format_exc()[-700:]
            log(name, failed=True, error=repr(error), where=where)
            if 'CUDA error' in str(error):  # nothing more will run
                break
        log('done', what=name, seconds=round(time.time() - start, 1))
    if log.failures:
        raise SystemExit(f'{log.failures} of the lines above say FAILED')


if __name__ == '__main__':
    main()
