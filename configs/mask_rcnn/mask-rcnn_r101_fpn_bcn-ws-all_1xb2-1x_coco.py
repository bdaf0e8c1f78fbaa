_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_1xb2-1x_coco.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint='open-mmlab://jhu/resnet101_gn_ws'),
    )
)
