# Why is BCN behind GroupNorm in segmentation_long.py? The backbone or the
# heads, the output affine, an update rate too fast, or the separable
# convolutions, which mmseg builds without conv_cfg and so without WS?
_base_ = './segmentation_long.py'
bcn = dict(method='BCN+WS', images=1, update_rate=0.0006)
blocks = [
    dict(method='GN+WS', images=1),
    bcn,
    dict(bcn, update_rate=0.0),  # averages of all images so far
    dict(bcn, head_method='GN+WS'),
    dict(bcn, method='GN+WS', head_method='BCN+WS'),
    dict(bcn, channel_affine='channel'),
    dict(bcn, separable_ws=True),
    dict(method='GN+WS', images=1, separable_ws=True),
    dict(bcn, update_rate=0.0, separable_ws=True),
]
seeds = [0, 1]

report = dict(
    rows=[
        'method',
        'head_method',
        'channel_affine',
        'update_rate',
        'separable_ws',
    ],
)
