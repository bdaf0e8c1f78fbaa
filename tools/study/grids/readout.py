# What random features say of where objects are: does centring filters, or
# channels, cost? Batches of 60 images, so BCN has their own statistics.
task = 'readout'
common = dict(
    config='configs/digits/mask-rcnn_r18-slim_fpn_bn_1xb1-5e_digits.py',
    images=1,
    batch_size=2,
    num_train=60,
    num_val=2,
    lr=None,
)
blocks = [
    dict(
        method=['GN', 'GN+WN', 'GN+CWN', 'GN+WS', 'BN', 'BCN-large'],
        spread=[0.0, 0.5, 1.0],
    ),
]
seeds = [0, 1, 2, 3, 4]

report = dict(
    metric='stride16',
    metric_name='area under the ROC curve, stride 16',
    also=dict(stride4='stride 4', stride8='stride 8', stride32='stride 32'),
    digits=3,
    rows='method',
    columns='spread',
    columns_name='spread of the scenes',
)
