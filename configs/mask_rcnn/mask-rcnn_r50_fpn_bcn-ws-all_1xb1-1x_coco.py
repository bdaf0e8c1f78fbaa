_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    '../_base_/micro_batch.py',
]
from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model,
    images_per_gpu=1,
    images_per_update=16,
    pretrained='open-mmlab://jhu/resnet50_gn_ws',
)
# As in the authors' detector: the box head's convolutions, under a
# normalization, take steps in proportion to 1 / std^2 of their weights.
model.roi_head.bbox_head.init_cfg = [
    dict(type='Normal', layer='Conv2d', std=0.01),
    dict(type='Xavier', layer='Linear', distribution='uniform'),
    dict(type='Normal', std=0.01, override=dict(name='fc_cls')),
    dict(type='Normal', std=0.001, override=dict(name='fc_reg')),
]
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(
    # An optimizer step takes 16 images, as in the zoo, on one GPU. On several,
    # divide accumulative_counts by their number.
    accumulative_counts=16,
    # As in the authors' detector, those of normalizations included.
    paramwise_cfg=dict(custom_keys=dict(bias=dict(lr_mult=2, decay_mult=0))),
)
# What --auto-scale-lr compares with counts the images of one iteration on all
# GPUs, without accumulation: on 4 GPUs it makes the learning rate 4 times as
# large, for optimizer steps of 64 images.
auto_scale_lr = dict(base_batch_size=1)
# Schedulers count iterations: 500 optimizer steps of warm-up, from a third of
# the rate as in the authors' detector.
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(start_factor=1 / 3, end=500 * 16)
