# The same as detection.py at one image, against how much the scenes differ.
task = 'openmmlab'
common = dict(
    config='configs/digits/mask-rcnn_r18-slim_fpn_bn_1xb1-5e_digits.py',
    steps=750,
    batch_size=2,
    num_train=600,
    num_val=300,
    images=1,
)
blocks = [
    dict(method=['BN', 'GN', 'GN+WS', 'BCN+WS'], spread=[0.0, 0.5, 1.0]),
]
seeds = [0, 1, 2]
tune = dict(
    lr=[3e-4, 1e-3, 3e-3],
    seeds=[100],
    at=dict(spread={0.0: 0.5, 1.0: 0.5}),
)

report = dict(
    metric='segm_mAP',
    metric_name='mask AP',
    also=dict(bbox_mAP='box AP'),
    digits=3,
    rows='method',
    columns='spread',
    columns_name='spread of the scenes',
)
