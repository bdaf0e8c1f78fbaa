"""What does folding save at inference, and what does a normalization cost?

Forward passes of ResNet-50 in evaluation: BN as it is and fused into the
convolutions, GN and BCN with WS as they are, and both folded.

    python tools/benchmarks/folded_model.py --device cpu --threads 2
"""

import copy

import _ops  # noqa: F401  before mmdet
import torch
from _harness import begin, each, markdown, parser, report, seconds
from mmcv.cnn import fuse_conv_bn
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmdet.models import ResNet

from wsbcn_mm import ConvWS, fold_for_inference

BASELINE = 'BN, fused'


def with_stock_ws(model):
    """mmcv's ConvWS, which standardizes in every forward."""
    for module in model.modules():
        if isinstance(module, ConvWS):
            module.__class__ = ConvWS2d
    return model


def build(depth: int, norm: dict, conv=None) -> torch.nn.Module:
    cfg = None if conv is None else dict(type=conv)
    model = ResNet(depth, norm_cfg=norm, conv_cfg=cfg)
    model.eval()
    return model


def variants(depth: int) -> dict:
    gn, bcn = dict(type='GN', num_groups=32), dict(type='BCN')
    bn = build(depth, dict(type='BN'))
    gn_ws, bcn_ws = (build(depth, norm, 'ConvWS') for norm in (gn, bcn))
    return {
        'BN': bn,
        BASELINE: fuse_conv_bn(copy.deepcopy(bn)),
        'GN': build(depth, gn),
        "GN + mmcv's WS": with_stock_ws(copy.deepcopy(gn_ws)),
        'GN + WS': gn_ws,
        'GN + WS, folded': fold_for_inference(gn_ws),
        'BCN + WS': bcn_ws,
        'BCN + WS, folded': fold_for_inference(bcn_ws),
    }


def main(argv=None):
    options = parser(__doc__.split('\n')[0], 'folded_model')
    options.add_argument(
        '--shapes', nargs='+', default=['1x256x320', '1x512x640'],
        help='batch x height x width',
    )  # fmt: skip
    args = options.parse_args(argv)
    begin(args)
    depth = 18 if args.small else 50
    shapes = ['1x64x64'] if args.small else args.shapes
    models = {
        name: model.to(args.device) for name, model in variants(depth).items()
    }
    results = []
    for shape in each(shapes, 'shapes'):
        batch, height, width = map(int, shape.split('x'))
        x = torch.randn(batch, 3, height, width, device=args.device)
        with torch.inference_mode():
            times = seconds(
                {n: lambda m=m, x=x: m(x) for n, m in models.items()},
                args,
            )
        results += [
            dict(
                shape=shape, model=name, ms=1e3 * t, ratio=t / times[BASELINE]
            )
            for name, t in times.items()
        ]
    rows = [
        [name]
        + [
            cell
            for r in results
            if r['model'] == name
            for cell in (r['ms'], r['ratio'])
        ]
        for name in models
    ]
    header = [f'ResNet-{depth}']
    for shape in shapes:
        header += [f'{shape} ms', 'of BN, fused']
    report(args.out, 'folded_model', args, results, markdown(header, rows))


if __name__ == '__main__':
    main()
