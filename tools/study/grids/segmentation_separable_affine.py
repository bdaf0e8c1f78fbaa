# BCN's output affine in segmentation_separable_steps.py: one pair per channel,
# which a checkpoint from GN has, instead of one per group.
_base_ = './segmentation_separable_steps.py'
common = dict(method='BCN+WS', images=1, update_rate=0.0006, separable_ws=True)
blocks = [dict(channel_affine='channel')]
tune = dict(lr=[1e-2, 1.8e-2, 3.2e-2])

report = dict(rows=['method', 'channel_affine'])
