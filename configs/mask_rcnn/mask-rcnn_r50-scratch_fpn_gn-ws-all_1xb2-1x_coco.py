_base_ = './mask-rcnn_r50_fpn_gn-ws-all_1xb2-1x_coco.py'
from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model, norm_cfg=dict(type='GN', num_groups=32), pretrained=False
)
