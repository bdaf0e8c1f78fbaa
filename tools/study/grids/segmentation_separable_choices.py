# Two forms of BCN in segmentation_separable_steps.py: one output affine per
# channel, which a checkpoint from GN has, and the statistics of all 16 images
# instead of estimates, which the authors' segmentation code has.
_base_ = './segmentation_separable_steps.py'
common = dict(separable_ws=True)
blocks = [
    dict(
        method='BCN+WS',
        images=1,
        update_rate=0.0006,
        channel_affine='channel',
    ),
    dict(method='BCN-large+WS', images=16),
]
tune = dict(lr=[1e-2, 1.8e-2, 3.2e-2])

report = dict(rows=['method', 'channel_affine'])
