_base_ = './mask-rcnn_r18-slim_fpn_bn_1xb1-5e_digits.py'

from wsbcn_mm import micro_batch_model

# Few channels, so few groups. Each image is an update here.
model = micro_batch_model(
    _base_.model,
    norm_cfg=dict(type='BCN', num_groups=4),
    images_per_update=1,
)
