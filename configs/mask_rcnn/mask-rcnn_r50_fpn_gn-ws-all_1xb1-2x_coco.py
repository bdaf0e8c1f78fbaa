_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_1xb1-2x_coco.py'
from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model, norm_cfg=dict(type='GN', num_groups=32)
)
