# detection_pretrained.py with the optimizer of the zoo's schedules (SGD, the
# digits have AdamW): which update rate do BCN's estimates need there?
_base_ = './detection_pretrained.py'
common = dict(zoo_optimizer=True)
bcn = dict(method='BCN+WS', images=1)
blocks = [
    dict(bcn, update_rate=[0.0006, 0.00625, 0.03]),
    dict(method='GN+WS', images=1),
]
tune = dict(lr=[0.02, 0.06])

report = dict(rows=['method', 'update_rate'])
