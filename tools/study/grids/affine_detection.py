# An output affine per channel instead of one per group, in the detectors of
# detection_pretrained.py, which has the latter.
_base_ = './detection_pretrained.py'
blocks = [
    dict(method='BCN+WS', images=1, lr=3e-3, channel_affine='channel'),
]
tune = None

report = dict(rows=['method', 'channel_affine'])
