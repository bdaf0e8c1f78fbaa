# What do estimates cost BCN in segmentation_separable_steps.py? The statistics
# of all 16 images with the gradient through them (BCN-large), without it
# (r = 1), estimates that follow all 16 images, and those of one at a time.
_base_ = './segmentation_separable_steps.py'
common = dict(separable_ws=True, lr=1.8e-2)
blocks = [
    dict(method='BCN-large+WS', images=16),
    dict(method='BCN+WS', images=16, update_rate=[1.0, 0.01]),
    dict(method='BCN+WS', images=1, update_rate=0.0006),
]
seeds = [0, 1]
tune = None

report = dict(rows=['method', 'update_rate'])
