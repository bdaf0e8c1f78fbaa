# The output affine and the update rate in detection_pretrained.py, whose BCN
# has an affine per group and r = 0.00625.
_base_ = './detection_pretrained.py'
bcn = dict(method='BCN+WS', images=1, lr=3e-3, update_rate=0.00625)
blocks = [
    bcn,
    dict(bcn, channel_affine='channel'),
    dict(bcn, update_rate=[0.0006, 0.02, 0.06]),
    dict(bcn, channel_affine='channel', update_rate=0.06),
    dict(bcn, fresh_estimates=True),
]
tune = None

report = dict(
    rows=['method', 'channel_affine', 'update_rate', 'fresh_estimates'],
)
