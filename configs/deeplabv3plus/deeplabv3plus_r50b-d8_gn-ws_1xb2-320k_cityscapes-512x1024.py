_base_ = './deeplabv3plus_r50b-d8_bcn-ws_1xb2-320k_cityscapes-512x1024.py'
from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model, norm_cfg=dict(type='GN', num_groups=32)
)
