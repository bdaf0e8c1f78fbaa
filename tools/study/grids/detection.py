# Mask R-CNN with FPN from scratch, on digit scenes as different as the middle
# of what there is between one table and many photographs. A GroupNorm does not
# see how many images there are: one row.
task = 'openmmlab'
common = dict(
    config='configs/digits/mask-rcnn_r18-slim_fpn_bn_1xb1-5e_digits.py',
    steps=750,
    batch_size=2,
    num_train=600,
    num_val=300,
    spread=0.5,
)
blocks = [
    dict(method=['BN', 'GN', 'GN+WS'], images=1),
    dict(method='BCN+WS', images=1, update_rate=0.00625),
    dict(method='MABN+CenConv', images=1),
    dict(method='BN', images=2),
    dict(method='BCN+WS', images=2, update_rate=0.0125),
]
seeds = [0, 1, 2]
tune = dict(
    lr=[3e-4, 1e-3, 3e-3],
    seeds=[100],
    at=dict(images={2: 1}, update_rate={0.0125: 0.00625}),
)

report = dict(
    metric='segm_mAP',
    metric_name='mask AP',
    also=dict(bbox_mAP='box AP'),
    digits=3,
    dots=True,
    rows='method',
    columns='images',
    columns_name='images per normalization batch',
)
