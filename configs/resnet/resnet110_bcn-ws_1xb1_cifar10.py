_base_ = './resnet18_bcn-ws_1xb1_cifar10.py'
import wsbcn_mm.models  # noqa: F401  registers CIFARResNet
from wsbcn_mm import micro_batch_model

custom_imports = dict(imports=['wsbcn_mm', 'wsbcn_mm.models'])
# 16, 32 and 64 channels: four groups have 4, 8 and 16.
model = micro_batch_model(
    dict(_base_.model, backbone=dict(type='CIFARResNet', depth=110)),
    norm_cfg=dict(type='BCN', num_groups=4),
    images_per_gpu=1,
    images_per_update=128,
)
model.head.in_channels = 64
# The schedule of the code that the authors' is based on.
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
train_cfg = dict(max_epochs=164)
param_scheduler = dict(milestones=[81, 122], gamma=0.1)
