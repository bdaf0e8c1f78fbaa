"""Take the layers of wsbcn_mm out of a trained model.

Writes OUT.pth and OUT.py, a checkpoint and a config that stock MMDetection,
MMSegmentation or MMPretrain loads without this package. Where no such config
exists, and for other runtimes, ``--onnx`` writes OUT.onnx instead.
"""

import argparse
import os

import torch
from mmengine.registry import MODELS
from mmengine.runner import save_checkpoint
from mmengine.utils import digit_version
from torch.utils._pytree import tree_leaves

import wsbcn_mm
from wsbcn_mm.deploy import fold_for_inference, largest_difference
from wsbcn_mm.engine.checkpoint import (
    load_all_weights,
    read_checkpoint,
    read_config,
)
from wsbcn_mm.engine.command_line import UsageError, run
from wsbcn_mm.engine.mistakes import mistakes_explained
from wsbcn_mm.engine.stock import (
    NotExpressible,
    brings_norm,
    config_text,
    stock_model,
)
from wsbcn_mm.stock_layers import NotReplaceable

# Before that, the exporter of this name fails on nearly any network.
HAS_DYNAMO = digit_version(torch.__version__) >= digit_version('2.5')
TOLERANCE = 1e-4  # of the largest output; float32 through a hundred layers


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='the config the model was trained with')
    parser.add_argument('checkpoint', help='the trained checkpoint')
    parser.add_argument('out', help='what the new files begin with')
    parser.add_argument(
        '--onnx',
        action='store_true',
        help='write OUT.onnx, for a segmentor or a classifier',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        default=[256, 320],
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the image to compare outputs with, and that of the '
        'exported model',
    )
    return parser.parse_args()


def outputs(model, image):
    """What comes before predictions are chosen, as a list of tensors."""
    with torch.no_grad():
        if hasattr(model, 'rpn_head') or hasattr(model, 'bbox_head'):
            features = model.extract_feat(image)
            head = getattr(model, 'rpn_head', None) or model.bbox_head
            result = [features, head(features)]
            if getattr(model, 'roi_head', None) is not None:
                height, width = image.shape[2:]
                rois = image.new_tensor([[0, 0, 0, width / 2, height / 2]])
                result += model.roi_head.forward(
                    features, [_proposals(rois[:, 1:])]
                )
        else:
            result = model(image, mode='tensor')
    return [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]


def _proposals(boxes):
    from mmengine.structures import InstanceData

    return InstanceData(bboxes=boxes)


def compare(model, folded, image) -> float:
    difference = largest_difference(
        outputs(folded, image), outputs(model, image)
    )
    if not difference < TOLERANCE:
        raise UsageError(
            f'the folded model does not compute the same (it is off by '
            f'{difference:.1e} of the largest output); nothing was '
            'written. Please report it.'
        )
    return difference


def main():
    args = parse_args()
    cfg = read_config(args.config)
    checkpoint = read_checkpoint(args.checkpoint)
    meta = checkpoint['meta'] or {}
    with mistakes_explained(cfg):
        model = MODELS.build(cfg.model)
    load_all_weights(
        model, checkpoint['state_dict'], repr(args.checkpoint), strict=True
    )
    model.eval()
    torch.manual_seed(0)
    image = torch.randn(1, 3, *args.shape)
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    if args.onnx:
        try:
            folded, report = fold_for_inference(model, return_report=True)
        except NotReplaceable as error:
            raise UsageError(str(error)) from error
        print(report)
        difference = compare(model, folded, image)
        with torch.no_grad():
            torch.onnx.export(
                folded, (image,), f'{args.out}.onnx', dynamo=HAS_DYNAMO
            )
        written = f'{args.out}.onnx'
    else:
        try:
            stock_cfg, stock = stock_model(cfg, model)
        except (NotExpressible, NotReplaceable) as error:
            raise UsageError(str(error)) from error
        difference = compare(model, stock, image)
        save_checkpoint(
            dict(
                state_dict=stock.state_dict(),
                meta=dict(
                    folded_by=f'wsbcn_mm {wsbcn_mm.__version__}',
                    dataset_meta=meta.get('dataset_meta') or {},
                ),
            ),
            f'{args.out}.pth',
            backend_args=dict(backend='durable'),
        )
        with open(f'{args.out}.py', 'w', encoding='utf-8') as file:
            file.write(config_text(stock_cfg))
        if brings_norm(stock_cfg):
            print(
                'The config brings a BatchGroupNorm of its own, where a '
                'convolution has no place for a bias or the numbers of '
                'groups differ.'
            )
        written = f'{args.out}.pth and {args.out}.py'
    print(
        f'Wrote {written}. Outputs differ by at most {difference:.1e} of the '
        'largest one.'
    )


if __name__ == '__main__':
    run(main)
