_base_ = './deeplabv3plus_r50b-d8_bcn-ws_1xb1-640k_cityscapes-769x769.py'
from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model, norm_cfg=dict(type='GN', num_groups=32)
)
