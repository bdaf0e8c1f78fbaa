_base_ = './resnet110_bcn-ws_1xb1_cifar10.py'
from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model,
    norm_cfg=dict(type='BCN', num_groups=4),
    images_per_gpu=2,
    images_per_update=128,
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(accumulative_counts=64)
auto_scale_lr = dict(base_batch_size=2)
