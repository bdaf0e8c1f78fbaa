# detection_pretrained.py with the optimizer of the zoo's schedules (SGD, the
# digits have AdamW): which update rate do BCN's estimates need there?
_base_ = './detection_pretrained.py'
common = dict(zoo_optimizer=True)
blocks = [
    dict(method='BCN+WS', images=1, update_rate=[0.0006, 0.00625, 0.06]),
    dict(method=['GN+WS', 'BN-frozen'], images=1),
]
tune = dict(lr=[0.02, 0.06, 0.2])

report = dict(rows=['method', 'update_rate'])
