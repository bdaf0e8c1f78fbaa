_base_ = './resnet110_bcn-ws_1xb2_cifar10.py'
from wsbcn_mm import micro_batch_model

model = micro_batch_model(_base_.model, norm_cfg=dict(type='GN', num_groups=4))
