"""How long is the processor busy with a layer, while a GPU waits for it?

At one image the launches of a layer, not its arithmetic, are often what takes
time on a fast GPU. Measured are forward and backward of a chain of layers on
tiny inputs, without waiting for the GPU.

Where there is none, a stand-in for Triton's driver takes the launches of our
kernels, and does nothing. What the driver itself would take for each launch
is missing then. PyTorch's operations run on the processor, and each counts as
one launch, though some, as Group Normalization, are several.

    python tools/benchmarks/launch_cost.py
"""

import time
from contextlib import nullcontext

import torch
from _harness import (
    STATISTICS,
    bar_plot,
    begin,
    each,
    keep,
    launches,
    markdown,
    parser,
    report,
    synchronize,
)
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from torch import nn

from wsbcn_mm import BCN, BGN, MABN, ConvWS
from wsbcn_mm.functional import kernels

try:
    import _stand_in
    from _launches import Launches

    from wsbcn_mm.functional.kernels import fused
except ImportError as error:
    raise SystemExit(
        f'error: {error}. It is about the launches of Triton kernels: '
        'install triton.'
    ) from None

CHANNELS = 64
SMALL, LARGE = (1, CHANNELS, 8, 8), (1, CHANNELS, 96, 96)
PAIR = (2, CHANNELS, 8, 8)
CONV = dict(kernel_size=1, bias=False)
LAYERS = {
    'GroupNorm': (SMALL, lambda: nn.GroupNorm(32, CHANNELS)),
    'BatchNorm': (SMALL, lambda: nn.BatchNorm2d(CHANNELS)),
    'BCN, small map': (SMALL, lambda: BCN(CHANNELS)),
    'BCN, large map': (LARGE, lambda: BCN(CHANNELS)),
    'BCN, grad_averaging=0.05': (
        SMALL,
        lambda: BCN(CHANNELS, grad_averaging=0.05),
    ),
    'BCN, grad_averaging=16': (
        SMALL,
        lambda: BCN(CHANNELS, grad_averaging=16),
    ),
    'BCN, estimate=False': (PAIR, lambda: BCN(CHANNELS, estimate=False)),
    'BGN': (PAIR, lambda: BGN(CHANNELS, 8)),
    'MABN': (PAIR, lambda: MABN(CHANNELS, 2, 16)),
    'Conv2d': (SMALL, lambda: nn.Conv2d(CHANNELS, CHANNELS, **CONV)),
    'mmcv ConvWS': (
        SMALL,
        lambda: ConvWS2d(CHANNELS, CHANNELS, **CONV),
    ),
    'ConvWS': (SMALL, lambda: ConvWS(CHANNELS, CHANNELS, **CONV)),
}
THEIRS = {'GroupNorm', 'BatchNorm', 'Conv2d', 'mmcv ConvWS'}


def measure(name, depth, args):
    shape, layer = LAYERS[name]
    net = nn.Sequential(*[layer() for _ in range(depth)]).to(args.device)
    x = torch.randn(shape, device=args.device, requires_grad=True)
    inputs, grad = (x, *net.parameters()), torch.randn_like(net(x))
    kernel = nullcontext()
    if args.device == 'cpu' and name not in THEIRS:
        kernel = kernels.use('cpu', fused)
    times = []
    with kernel:
        for repeat in range(-2, args.repeats):
            synchronize(args.device)
            start = time.perf_counter()
            y = net(x)
            between = time.perf_counter()
            torch.autograd.grad(y, inputs, grad)
            end = time.perf_counter()
            if repeat >= 0:
                times.append((between - start, end - between))

        def both():
            torch.autograd.grad(net(x), inputs, grad)

        if args.device == 'cpu':
            launched = Launches()
            with launched.counted():
                both()
            count = len(launched.names)
        else:
            count = len(launches(both, args.device))
    forward, backward = (
        STATISTICS[args.statistic](t) / depth * 1e6 for t in zip(*times)
    )
    return dict(
        layer=name,
        forward_us=forward,
        backward_us=backward,
        launches=count / depth,
    )


def main(argv=None):
    options = parser(__doc__.split('\n')[0], 'launch_cost')
    args = options.parse_args(argv)
    begin(args)
    if args.device == 'cpu':
        _stand_in.install()
    depth = 2 if args.small else 20
    results = []
    for name in each(list(LAYERS), 'Layers'):
        results.append(measure(name, depth, args))
        keep(args.out, 'launch_cost', args, results)
    header = ['layer', 'forward us', 'backward us', 'both', 'launches']
    rows = [
        [
            r['layer'],
            r['forward_us'],
            r['backward_us'],
            r['forward_us'] + r['backward_us'],
            r['launches'],
        ]
        for r in results
    ]
    report(args.out, 'launch_cost', args, results, markdown(header, rows))
    bar_plot(
        args.out / 'launch_cost.png',
        [r['layer'] for r in results],
        {
            way: [r[f'{way}_us'] for r in results]
            for way in ('forward', 'backward')
        },
        "the processor's time [us]",
    )


if __name__ == '__main__':
    main()
