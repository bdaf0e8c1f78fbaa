"""What does Weight Standardization add to ResNet-50's 53 convolutions?

Forward and backward of each convolution on a small input, so that the weights
are what costs; the overhead is what takes longer than the plain convolution.

    python tools/benchmarks/conv_ws.py --device cpu --threads 2
"""

import copy
from contextlib import nullcontext

import torch
from _harness import (
    bar_plot,
    begin,
    each,
    keep,
    launches,
    markdown,
    parser,
    report,
    saved_bytes,
    seconds,
)
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from torch import nn

from wsbcn_mm import ConvWS

LAYERS = {'Conv2d': nn.Conv2d, 'mmcv ConvWS': ConvWS2d, 'ConvWS': ConvWS}


def resnet50():
    """(in, out, kernel, stride) of its convolutions, and their number."""
    count = {(3, 64, 7, 2): 1}
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            convs = [
                (channels, width, 1, 1),
                (width, width, 3, stride),
                (width, 4 * width, 1, 1),
            ]
            if not block:
                convs.append((channels, 4 * width, 1, stride))
            for conv in convs:
                count[conv] = count.get(conv, 0) + 1
            channels = 4 * width
    assert sum(count.values()) == 53
    return count


def measure(conv, number, dtype, calls, args):
    inputs, outputs, kernel, stride = conv
    x = torch.randn(1, inputs, 8, 8, device=args.device)
    autocast = (
        torch.autocast(args.device, dtype)
        if (dtype != torch.float32)
        else nullcontext()
    )
    functions, rows = {}, {}
    for name, layer in LAYERS.items():
        layer = layer(
            inputs, outputs, kernel, stride, kernel // 2, bias=False
        ).to(args.device)

        def forward(layer=layer):
            with autocast:
                return sum(layer(x).sum() for _ in range(calls))

        def both(forward=forward, layer=layer):
            forward().backward()
            layer.zero_grad()

        evaluated = copy.deepcopy(layer).eval()

        def evaluate(layer=evaluated):
            with torch.no_grad(), autocast:
                for _ in range(calls):
                    layer(x)

        functions[name] = both
        functions[f'{name} eval'] = evaluate
        rows[name] = dict(
            saved_mib=saved_bytes(forward) / 2**20,
            launches=len(launches(both, args.device)),
        )
    times = seconds(functions, args)
    for name in LAYERS:
        rows[name].update(
            conv=conv,
            number=number,
            dtype=str(dtype).replace('torch.', ''),
            calls=calls,
            layer=name,
            ms=times[name] * 1e3,
            overhead_ms=(times[name] - times['Conv2d']) * 1e3,
            eval_ms=times[f'{name} eval'] * 1e3,
            eval_overhead_ms=(times[f'{name} eval'] - times['Conv2d eval'])
            * 1e3,
        )
    return list(rows.values())


def main(argv=None):
    options = parser(__doc__.split('\n')[0], 'conv_ws')
    options.add_argument(
        '--dtypes', nargs='+', default=['float32'],
        choices=['float32', 'bfloat16', 'float16'],
    )  # fmt: skip
    options.add_argument(
        '--calls', type=int, default=1, help='of a convolution in a step'
    )
    args = options.parse_args(argv)
    begin(args)
    convs = resnet50()
    if args.small:
        convs = {(16, 8, 3, 1): 1, (8, 16, 1, 1): 2}
    settings = [
        (conv, number, getattr(torch, dtype), args.calls)
        for dtype in args.dtypes
        for conv, number in convs.items()
    ]
    results = []
    for setting in each(settings, 'Convolutions'):
        results += measure(*setting, args)
        keep(args.out, 'conv_ws', args, results)

    def total(dtype, layer, key):
        return float(
            sum(
                r[key] * r['number']
                for r in results
                if (r['dtype'], r['layer']) == (dtype, layer)
            )
        )

    rows, bars = [], {}
    for dtype in args.dtypes:
        theirs = total(dtype, 'mmcv ConvWS', 'overhead_ms')
        for layer in LAYERS:
            overhead = total(dtype, layer, 'overhead_ms')
            rows.append(
                [
                    dtype,
                    layer,
                    total(dtype, layer, 'ms'),
                    overhead,
                    theirs / overhead if overhead > 0 else float('nan'),
                    total(dtype, layer, 'eval_overhead_ms'),
                    total(dtype, layer, 'saved_mib'),
                    int(total(dtype, layer, 'launches')),
                ]
            )
            bars.setdefault(layer, []).append(overhead)
    header = [
        'dtype', 'layer', 'ms', 'overhead ms', "mmcv's overhead / it",
        'eval overhead ms', 'saved MiB', 'launches',
    ]  # fmt: skip
    if args.device == 'cpu':  # no launches to count
        header, rows = header[:-1], [row[:-1] for row in rows]
    report(args.out, 'conv_ws', args, results, markdown(header, rows))
    bar_plot(
        args.out / 'conv_ws.png', args.dtypes, bars, 'overhead, 53 convs [ms]'
    )


if __name__ == '__main__':
    main()
