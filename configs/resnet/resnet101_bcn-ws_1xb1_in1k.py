_base_ = [
    'mmpretrain::resnet/resnet101_8xb32_in1k.py',
    '../_base_/micro_batch.py',
]
from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model, images_per_gpu=1, images_per_update=128
)
train_dataloader = dict(batch_size=1)
# An optimizer step takes 128 images on one GPU, as the authors' of ResNet-101.
# On several, divide accumulative_counts by their number.
optim_wrapper = dict(accumulative_counts=128)
# What --auto-scale-lr compares with counts the images of one iteration on all
# GPUs, without accumulation.
auto_scale_lr = dict(base_batch_size=1)
