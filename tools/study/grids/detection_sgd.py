# detection_pretrained.py with the optimizer of the zoo's schedules, SGD,
# instead of the digits' AdamW.
_base_ = './detection_pretrained.py'
common = dict(zoo_optimizer=True)
blocks = [
    dict(method=['BN-frozen', 'BN', 'GN', 'GN+WS', 'MABN+CenConv'], images=1),
    dict(method='BCN+WS', images=1, update_rate=[0.0006, 0.00625]),
    dict(method='BN', images=2),
    dict(method='BCN+WS', images=2, update_rate=0.00125),
]
tune = dict(
    lr=[0.01, 0.02, 0.035, 0.06, 0.12],
    at=dict(update_rate={0.00125: 0.0006}),
)

bcn = dict(method='BCN+WS', images=1, update_rate=0.0006)
report = dict(
    rows=['method', 'update_rate'],
    compare=[
        [bcn, dict(method='GN+WS')],
        [bcn, dict(method='BN-frozen')],
        [bcn, dict(method='BN', images=1)],
        [bcn, dict(method='BN', images=2)],
        [dict(method='BN', images=2), dict(method='GN+WS')],
        [dict(method='BN', images=2), dict(method='BN-frozen')],
    ],
)
