_base_ = './resnet18_bcn-ws_1xb1_in1k.py'
from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model, norm_cfg=dict(type='GN', num_groups=32)
)
