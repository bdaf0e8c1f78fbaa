# segmentation.py with standardized weights in the separable convolutions too,
# which mmseg builds without conv_cfg, at the package's update rate.
_base_ = './segmentation.py'
common = dict(separable_ws=True, images=1)
blocks = [
    dict(method='BCN+WS', update_rate=0.0006),
    dict(method=['GN+WS', 'MABN+CenConv']),
]
tune = dict(lr=[3e-3, 1e-2])

report = dict(rows='method')
