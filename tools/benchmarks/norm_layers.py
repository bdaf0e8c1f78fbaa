"""How long does a normalization layer take, and what does it keep?

Forward and backward of one layer in training, in shapes of ResNet-50-FPN.
The floor is 8 passes over the activations at the speed of a large copy: 2
reads and a write forward, 4 reads and a write backward. Activations that the
L2 cache of a GPU holds have none, since they are read from there.

On a GPU "ms" is as long as the processor takes to launch a layer where that is
longer; "GPU ms" is the time without it, of a graph of its launches. The most
telling settings come first, and each is written as soon as it is measured.

    python tools/benchmarks/norm_layers.py --device cpu --threads 2
"""

import importlib
import math
from contextlib import nullcontext

import torch
from _harness import (
    REPLAYS,
    bar_plot,
    begin,
    cache_bytes,
    copy_bandwidth,
    each,
    geometric_mean,
    keep,
    launches,
    markdown,
    parser,
    peak_bytes,
    report,
    saved_bytes,
    seconds,
    without_launching,
)
from _variants import (
    AuthorsBCN,
    BatchThenGroupNorm,
    EstimatesThenGroupNorm,
    TextbookBCN,
)
from torch import nn

from wsbcn_mm import BCN
from wsbcn_mm.functional import kernels

PASSES = 8
BASELINE = 'GroupNorm'
MAIN_SHAPES = [
    (1, 256, 200, 304),
    (2, 64, 200, 304),
    (1, 1024, 50, 76),
    (2, 2048, 25, 38),
]
CUDA_SHAPES = [
    *MAIN_SHAPES,
    (1, 64, 400, 608),
    (1, 512, 100, 152),
    (2, 256, 200, 304),
    (512, 256, 7, 7),
    (128, 256, 14, 14),
]
LAYERS = {
    'GroupNorm': lambda channels: nn.GroupNorm(32, channels),
    'BatchNorm': nn.BatchNorm2d,
    'BatchNorm + GroupNorm': BatchThenGroupNorm,
    'BCN, estimates + GroupNorm': EstimatesThenGroupNorm,
    'BCN textbook': TextbookBCN,
    "BCN authors' form": AuthorsBCN,
}
BACKENDS = {
    'cpu': ['plain', 'cpu', 'compiled'],
    'cuda': ['plain', 'cuda', 'fused'],
}
# What the goals on a GPU are about.
CUDA_LAYERS = ['GroupNorm', 'BCN', "BCN authors' form", 'BCN [cuda]']
FORMATS = {
    'contiguous': torch.contiguous_format,
    'channels_last': torch.channels_last,
}


def variants(device, channels):
    """Names to layers and to what chooses their kernels."""
    for name, layer in LAYERS.items():
        yield name, layer(channels), nullcontext
    yield 'BCN', BCN(channels), nullcontext
    for averaging in (0.05, 16):
        layer = BCN(channels, grad_averaging=averaging)
        yield f'BCN, grad_averaging={averaging}', layer, nullcontext
    for backend in BACKENDS[device]:
        module = importlib.import_module(
            f'wsbcn_mm.functional.kernels.{backend}'
        )
        yield (
            f'BCN [{backend}]',
            BCN(channels),
            lambda module=module: kernels.use(device, module),
        )


def step(layer, kernel, x, dtype, device):
    """Forward alone, and forward and backward."""
    autocast = (
        torch.autocast(device, dtype)
        if dtype != torch.float32
        else (nullcontext())
    )

    def forward():
        with kernel(), autocast:
            return layer(x)

    grad = torch.randn_like(forward())
    inputs = x, *layer.parameters()

    def both():
        y = forward()
        with kernel():
            torch.autograd.grad(y, inputs, grad)

    return forward, both


def measure(shape, dtype, layout, args):
    x = torch.randn(shape, device=args.device).to(dtype)
    x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()
    size = x.numel() * x.element_size()
    functions, rows = {}, {}
    for name, layer, kernel in variants(args.device, shape[1]):
        if name not in args.layers:
            continue
        layer.to(args.device)
        forward, both = step(layer, kernel, x, dtype, args.device)
        functions[name] = both
        launched = launches(both, args.device)
        rows[name] = dict(
            saved_mib=saved_bytes(forward) / 2**20,
            peak_mib=peak_bytes(both, args.device) / 2**20,
            launches=len(launched),
            kernels_us=launched,
        )
    times = seconds(functions, args)
    floor = math.nan
    if size > cache_bytes(args.device):
        floor = PASSES * size / args.bandwidth
    on_gpu = times
    if args.device == 'cuda':
        graphs = {n: without_launching(f) for n, f in functions.items()}
        made = {n: graph for n, graph in graphs.items() if graph}
        on_gpu = dict.fromkeys(functions, math.nan)
        for name, time in seconds(made, args, on_gpu=True).items():
            on_gpu[name] = time / REPLAYS
    for name, time in times.items():
        rows[name].update(
            shape=shape,
            dtype=str(dtype).replace('torch.', ''),
            layout=layout,
            layer=name,
            ms=time * 1e3,
            over_group_norm=time / times[BASELINE],
            gpu_ms=on_gpu[name] * 1e3,
            gpu_over_group_norm=on_gpu[name] / on_gpu[BASELINE],
            over_floor=on_gpu[name] / floor,
            floor_ms=floor * 1e3,
        )
    return list(rows.values())


def summary(results):
    """Each layer's time over GroupNorm's, and so on, in the mean."""
    layers = list(dict.fromkeys(r['layer'] for r in results))
    settings = list(dict.fromkeys((r['dtype'], r['layout']) for r in results))
    for dtype, layout in settings:
        chosen = [
            r for r in results if (r['dtype'], r['layout']) == (dtype, layout)
        ]
        bcn = [r['ms'] for r in chosen if r['layer'] == 'BCN']
        for layer in layers:
            mine = [r for r in chosen if r['layer'] == layer]
            yield [
                dtype,
                layout,
                layer,
                *(
                    geometric_mean([r[key] for r in mine])
                    for key in ('ms', 'over_group_norm')
                ),
                geometric_mean([b / r['ms'] for b, r in zip(bcn, mine)]),
                _mean_over_floor(mine),
                sum(r['saved_mib'] for r in mine),
                *(
                    geometric_mean([r[key] for r in mine])
                    for key in ('gpu_ms', 'gpu_over_group_norm')
                ),
                sum(r['peak_mib'] for r in mine),
                max(r['launches'] for r in mine),
            ]


def _mean_over_floor(rows):
    values = [r['over_floor'] for r in rows]
    values = [v for v in values if not math.isnan(v)]
    return geometric_mean(values) if values else math.nan


def main(argv=None):
    options = parser(__doc__.split('\n')[0], 'norm_layers')
    options.add_argument(
        '--dtypes',
        nargs='+',
        default=None,
        choices=['float32', 'bfloat16', 'float16'],
        help='default: float32 on CPU, and float16 on CUDA',
    )
    options.add_argument(
        '--layouts', nargs='+', default=None, choices=list(FORMATS)
    )
    options.add_argument(
        '--layers',
        nargs='+',
        default=None,
        help=f'default: all on CPU, {CUDA_LAYERS} on CUDA',
    )
    args = options.parse_args(argv)
    on_cuda = args.device == 'cuda'
    known = [name for name, _, _ in variants(args.device, 64)]
    args.layers = args.layers or (CUDA_LAYERS if on_cuda else known)
    if not {BASELINE, 'BCN'} <= set(args.layers) <= set(known):
        options.error(
            f'--layers {args.layers}: expected {BASELINE}, BCN and others of '
            f'{known}'
        )
    begin(args)
    args.bandwidth = copy_bandwidth(args)
    shapes = CUDA_SHAPES if on_cuda else MAIN_SHAPES
    if args.small:
        shapes = [(1, 64, 8, 8), (2, 32, 5, 7)]
    dtypes = args.dtypes or (
        ['float32', 'float16'] if on_cuda else ['float32']
    )
    layouts = args.layouts or (list(FORMATS) if on_cuda else ['contiguous'])
    settings = [
        (shape, getattr(torch, dtype), layout)
        for layout in layouts
        for dtype in dtypes
        for shape in shapes
    ]
    results = []
    for setting in each(settings, 'Normalization layers'):
        results += measure(*setting, args)
        keep(args.out, 'norm_layers', args, results)
    header = [
        'dtype', 'layout', 'layer', 'ms', '/ GroupNorm', 'BCN / it',
        '/ floor', 'saved MiB', 'GPU ms', '/ GroupNorm', 'peak MiB',
        'launches',
    ]  # fmt: skip
    rows = list(summary(results))
    if not on_cuda:  # none of the last is measured
        header, rows = header[:-4], [row[:-4] for row in rows]
    table = markdown(header, rows)
    report(args.out, 'norm_layers', args, results, table)
    for dtype in dtypes:
        for layout in layouts:
            chosen = [
                r
                for r in results
                if (r['dtype'], r['layout']) == (dtype, layout)
            ]
            bars = {}
            for r in chosen:
                bars.setdefault(r['layer'], []).append(
                    r['gpu_over_group_norm']
                )
            bar_plot(
                args.out / f'norm_layers_{dtype}_{layout}.png',
                ['x'.join(map(str, shape)) for shape in shapes],
                bars,
                'time / GroupNorm',
            )


if __name__ == '__main__':
    main()
