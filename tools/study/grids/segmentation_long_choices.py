# Why is BCN behind GroupNorm in segmentation_long.py? The backbone or the
# heads, estimates or the statistics of the step's four images, the output
# affine, an update rate too fast, or the learning rate, which was tuned in
# shorter runs?
_base_ = './segmentation_long.py'
bcn = dict(method='BCN+WS', images=1, update_rate=0.0006)
blocks = [
    dict(method='GN+WS', images=1),
    bcn,
    dict(bcn, update_rate=0.0),  # averages of all images so far
    dict(bcn, head_method='GN+WS'),
    dict(bcn, method='GN+WS', head_method='BCN+WS'),
    dict(bcn, channel_affine='channel'),
    dict(method=['BCN-large+WS', 'BN'], images=4),
    dict(bcn, lr=1e-2),
    dict(method='GN+WS', images=1, lr=1e-2),
]
seeds = [0, 1]

report = dict(
    rows=['method', 'head_method', 'channel_affine', 'update_rate', 'lr'],
)
