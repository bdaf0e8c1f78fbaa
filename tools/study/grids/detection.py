# Mask R-CNN with FPN from scratch, on digit scenes as different as the middle
# of what there is between one table and many photographs.
task = 'openmmlab'
common = dict(
    config='configs/digits/mask-rcnn_r18-slim_fpn_bn_1xb1-5e_digits.py',
    steps=1000,
    batch_size=4,
    num_val=300,
)
spread = [0.0, 0.5, 1.0]
blocks = [
    dict(
        method=['BN', 'GN', 'GN+WS', 'BCN+WS', 'MABN+CenConv'],
        images=[1, 2],
        spread=spread,
    ),
]
seeds = [0, 1, 2]
tune = dict(
    lr=[1e-4, 3e-4, 1e-3],
    seeds=[100],
    at=dict(images={2: 1}, spread={0.0: 0.5, 1.0: 0.5}),
)

report = dict(
    metric='bbox_mAP',
    metric_name='box AP',
    also=dict(segm_mAP='mask AP'),
    digits=3,
    rows=['method', 'images'],
    columns='spread',
    columns_name='spread of the scenes',
)
