_base_ = './deeplabv3plus_r18-slim_bn_1xb1-4k_digits-160x160.py'

from wsbcn_mm import micro_batch_model

# Few channels, so few groups. Each image is an update here.
model = micro_batch_model(
    _base_.model,
    norm_cfg=dict(type='BCN', num_groups=4),
    images_per_update=1,
)
