# segmentation_rate_steps.py, 16 images a step, with standardized weights in
# the separable convolutions too, and higher learning rates to choose from.
_base_ = './segmentation_rate_steps.py'
blocks = [
    dict(method='BCN+WS', images=1, update_rate=0.0006, separable_ws=True),
    dict(method='GN+WS', images=1, separable_ws=True),
    dict(method='BN', images=16),
]
tune = dict(lr=[3e-3, 5.5e-3, 1e-2, 1.8e-2, 3.2e-2])

report = dict(rows='method')
