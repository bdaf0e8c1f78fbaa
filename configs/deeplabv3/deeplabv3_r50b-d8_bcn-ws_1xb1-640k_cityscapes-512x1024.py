_base_ = [
    'mmseg::deeplabv3/deeplabv3_r50b-d8_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/micro_batch.py',
]
from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model,
    images_per_gpu=1,
    images_per_update=8,
    pretrained='open-mmlab://jhu/resnet50_gn_ws',
)
train_dataloader = dict(batch_size=1)
# An optimizer step takes 8 images, as in the zoo, on one GPU. On several,
# divide accumulative_counts and all numbers of iterations by theirs.
optim_wrapper = dict(accumulative_counts=8)
# What --auto-scale-lr compares with counts the images of one iteration on all
# GPUs, without accumulation.
auto_scale_lr = dict(enable=False, base_batch_size=1)
# Iterations are forward passes: 80k optimizer steps, the zoo's, of 8 images.
train_cfg = dict(max_iters=640000, val_interval=64000)
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 640000
default_hooks = dict(checkpoint=dict(interval=64000))
