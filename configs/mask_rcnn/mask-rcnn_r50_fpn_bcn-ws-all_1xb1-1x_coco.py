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
train_dataloader = dict(batch_size=1)
# An optimizer step takes 16 images, as in the zoo, on one GPU. On several,
# divide accumulative_counts by their number.
optim_wrapper = dict(accumulative_counts=16)
# What --auto-scale-lr compares with counts the images of one iteration on all
# GPUs, without accumulation: on 4 GPUs it makes the learning rate 4 times as
# large, for optimizer steps of 64 images.
auto_scale_lr = dict(base_batch_size=1)
# Schedulers count iterations: 500 optimizer steps of warm-up.
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 500 * 16
