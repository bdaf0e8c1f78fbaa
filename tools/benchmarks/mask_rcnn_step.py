"""How long is a training step of Mask R-CNN, and how much memory has it?

R-50-FPN in the paper's form, with SGD, on one made-up image.

    python tools/benchmarks/mask_rcnn_step.py --device cuda --amp
"""

import _ops  # before mmdet
import _variants  # noqa: F401  registers what BCN is compared with
import mmdet.models  # noqa: F401
import numpy as np
import torch
from _harness import (
    CLOCKS,
    STATISTICS,
    bar_plot,
    begin,
    each,
    give_back_memory,
    keep,
    markdown,
    parser,
    report,
    saved_bytes,
    synchronize,
)
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from wsbcn_mm import micro_batch_model

BASE = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
PLAIN, OURS = dict(type='Conv2d'), dict(type='ConvWS')
MMCV = dict(type='MMCVConvWS')
GROUPS = dict(type='GN', num_groups=32)
ZOO = "the zoo's: BN, frozen, in the backbone only"
# The most telling first: a limit of time may cut the others off.
VARIANTS = {
    # The rate of the authors' form: their losses are compared in the tests.
    'BCN + ConvWS': (dict(type='BCN', num_groups=32, momentum=0.001), OURS),
    "GN + mmcv's ConvWS": (GROUPS, MMCV),
    'GN + ConvWS': (GROUPS, OURS),
    "BCN, authors' form, + mmcv's ConvWS": (
        dict(type='AuthorsBCN', num_groups=32),
        MMCV,
    ),
    'GN': (GROUPS, PLAIN),
    'BN': (dict(type='BN'), PLAIN),
    ZOO: None,
}


def sample(height, width, device, boxes=8):
    generator = np.random.default_rng(0)
    corner = generator.uniform(0, 0.6, (boxes, 2)) * (width, height)
    size = generator.uniform(0.1, 0.4, (boxes, 2)) * (width, height)
    box = np.concatenate([corner, corner + size], 1)
    masks = np.zeros((boxes, height, width), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, box.astype(int)):
        mask[y1:y2, x1:x2] = 1
    instances = InstanceData(
        bboxes=torch.tensor(box, dtype=torch.float32, device=device),
        labels=torch.tensor(generator.integers(0, 80, boxes), device=device),
        masks=BitmapMasks(masks, height, width),
    )
    result = DetDataSample(
        gt_instances=instances,
        ignored_instances=InstanceData(
            bboxes=torch.zeros(0, 4, device=device)
        ),
    )
    shape = (height, width)
    result.set_metainfo(
        dict(
            img_shape=shape,
            ori_shape=shape,
            pad_shape=shape,
            batch_input_shape=shape,
            scale_factor=(1.0, 1.0),
        )
    )
    return result


def build(name, args):
    cfg = get_config(BASE).model
    if name != ZOO:
        cfg = micro_batch_model(cfg, *VARIANTS[name], pretrained=False)
    torch.manual_seed(0)
    model = MODELS.build(Config(dict(model=cfg)).model)
    return model.to(args.device).train()


def run(name, args, height, width):
    """Time and memory of a step, and the first one's loss."""
    model = build(name, args)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    scaler = torch.amp.GradScaler(
        args.device, enabled=args.amp and args.device == 'cuda'
    )
    dtype = torch.float16 if args.device == 'cuda' else torch.bfloat16
    torch.manual_seed(0)
    images = torch.randn(args.images, 3, height, width, device=args.device)
    samples = [sample(height, width, args.device) for _ in range(args.images)]
    times, first, clock = [], None, CLOCKS[args.clock]

    def forward():
        with torch.autocast(args.device, dtype, enabled=args.amp):
            return model.parse_losses(model.loss(images, samples))[0]

    for repeat in range(-2, args.repeats):
        if repeat == 0 and args.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        synchronize(args.device)
        start = clock()
        loss = forward()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        synchronize(args.device)
        if repeat >= 0:
            times.append(clock() - start)
        if first is None:
            first = float(loss.detach())
    peak = 0
    if args.device == 'cuda':
        peak = torch.cuda.max_memory_allocated()
    return dict(
        seconds=STATISTICS[args.statistic](times),
        loss=first,
        saved_mib=saved_bytes(forward) / 2**20,
        peak_mib=peak / 2**20,
    )


def main(argv=None):
    options = parser(__doc__.split('\n')[0], 'mask_rcnn_step')
    options.add_argument('--images', type=int, default=1)
    options.add_argument(
        '--amp', action='store_true', help='float16 on CUDA, bfloat16 on CPU'
    )
    options.add_argument(
        '--variants', nargs='+', default=list(VARIANTS), choices=VARIANTS
    )
    _ops.add_option(options)
    args = options.parse_args(argv)
    begin(args)
    args.ops = _ops.choose(args.ops, args.device)
    register_all_modules(init_default_scope=False)
    init_default_scope('mmdet')
    height, width = (96, 128) if args.small else (800, 1344)
    results = []
    benchmark = 'mask_rcnn_step_amp' if args.amp else 'mask_rcnn_step'
    for name in each(args.variants, 'Mask R-CNN'):
        results.append(dict(variant=name, **run(name, args, height, width)))
        keep(args.out, benchmark, args, results)
        give_back_memory(args.device)
    base = next(
        (r for r in results if r['variant'] == "GN + mmcv's ConvWS"),
        results[0],
    )
    rows = [
        [
            r['variant'],
            r['seconds'] * 1e3,
            r['seconds'] / base['seconds'],
            r['saved_mib'],
            r['saved_mib'] / base['saved_mib'],
            r['peak_mib'],
            r['peak_mib'] / (base['peak_mib'] or 1),
        ]
        for r in results
    ]
    header = [
        'model', 'ms a step', f"/ {base['variant']}", 'saved MiB',
        f"/ {base['variant']}", 'peak MiB', f"/ {base['variant']}",
    ]  # fmt: skip
    if args.device == 'cpu':  # no peak is measured
        header, rows = header[:-2], [row[:-2] for row in rows]
    report(args.out, benchmark, args, results, markdown(header, rows))
    bar_plot(
        args.out / f'{benchmark}.png',
        ['step'],
        {r['variant']: [r['seconds'] * 1e3] for r in results},
        'ms a step',
    )


if __name__ == '__main__':
    main()
