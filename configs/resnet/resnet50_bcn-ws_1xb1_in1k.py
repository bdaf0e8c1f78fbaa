_base_ = [
    'mmpretrain::resnet/resnet50_8xb32_in1k.py',
    '../_base_/micro_batch.py',
]
from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model, images_per_gpu=1, images_per_update=256
)
train_dataloader = dict(batch_size=1)
# An optimizer step takes 256 images, as in the zoo, on one GPU. On several,
# divide accumulative_counts by their number.
optim_wrapper = dict(accumulative_counts=256)
# The authors' schedule of ResNet-50.
train_cfg = dict(max_epochs=90)
param_scheduler = dict(milestones=[30, 60])
# What --auto-scale-lr compares with counts the images of one iteration on all
# GPUs, without accumulation.
auto_scale_lr = dict(base_batch_size=1)
