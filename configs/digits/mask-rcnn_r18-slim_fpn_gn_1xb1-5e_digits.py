_base_ = './mask-rcnn_r18-slim_fpn_bn_1xb1-5e_digits.py'

from wsbcn_mm import micro_batch_model

# Plain GN, to compare with.
model = micro_batch_model(
    _base_.model,
    norm_cfg=dict(type='GN', num_groups=4),
    conv_cfg=dict(type='Conv2d'),
)
