_base_ = './deeplabv3plus_r50b-d8_bcn-ws_1xb1-640k_voc12aug-512x512.py'
model = dict(
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint='open-mmlab://jhu/resnet101_gn_ws'),
    )
)
