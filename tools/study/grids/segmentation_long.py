# segmentation.py three times as long, at the learning rate that all of these
# were tuned to there.
_base_ = './segmentation.py'
common = dict(steps=1200, lr=3e-3)
blocks = [
    dict(method='BCN+WS', images=1, update_rate=[0.0006, 0.00625]),
    dict(method='GN+WS', images=1),
    dict(method='BN', images=2),
    dict(method='MABN+CenConv', images=1),
    dict(method='BCN+WS', images=1, update_rate=0.0006, image_pool='GN'),
]
tune = None

report = dict(rows=['method', 'update_rate', 'image_pool'])
