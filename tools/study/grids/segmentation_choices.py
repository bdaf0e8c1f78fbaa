# What makes BCN's difference in segmentation.py: the output affine, the update
# rate, or the image pooling, whose map has one position per image?
_base_ = './segmentation.py'
bcn = dict(method='BCN+WS', images=1, lr=3e-3, update_rate=0.00625)
blocks = [
    bcn,
    dict(bcn, image_pool='GN'),
    dict(bcn, channel_affine='channel'),
    dict(bcn, update_rate=[0.0006, 0.002, 0.02, 0.06]),
    dict(bcn, image_pool='GN', update_rate=[0.0006, 0.06]),
    dict(bcn, fresh_estimates=True),
]
tune = None

report = dict(
    rows=[
        'method',
        'channel_affine',
        'update_rate',
        'image_pool',
        'fresh_estimates',
    ],
)
