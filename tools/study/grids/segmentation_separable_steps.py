# segmentation_rate_steps.py, 16 images a step, with standardized weights in
# the separable convolutions too.
_base_ = './segmentation_rate_steps.py'
common = dict(separable_ws=True, images=1)
blocks = [dict(method='BCN+WS', update_rate=0.0006), dict(method='GN+WS')]

report = dict(rows='method')
