_base_ = './deeplabv3_r50b-d8_bcn-ws_1xb2-320k_cityscapes-512x1024.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint='open-mmlab://jhu/resnet101_gn_ws'),
    )
)
