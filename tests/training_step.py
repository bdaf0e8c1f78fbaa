"""One training step of a zoo model on one random image."""

import torch
from mmengine.registry import MODELS, DefaultScope


def random_batch(scope: str, size):
    """What a dataloader of ``scope`` gives for one image of ``size``."""
    if scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(
            1, [[3, *size]], num_items=[3], num_classes=3, with_mask=True
        )
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(
        gt_sem_seg=PixelData(data=torch.randint(0, 5, (1, *size))),
        metainfo=dict(img_shape=size, ori_shape=size),
    )
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    return dict(inputs=[image], data_samples=[sample])


def training_step(model_cfg: dict, scope: str, size=(64, 96)):
    """Build a model, and run one forward and one backward pass of training.

    Returns:
        tuple[Module, Tensor]: The model with its gradients, and the loss.
    """
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(model_cfg)
        model.train()
        data = model.data_preprocessor(random_batch(scope, size), True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        loss.backward()
    return model, loss


def assert_trains(model, loss) -> None:
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f'{name} has no gradient'
        assert torch.isfinite(parameter.grad).all(), name
