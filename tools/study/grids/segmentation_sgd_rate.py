# segmentation_separable_steps.py with the zoo's optimizer, SGD, instead of the
# digits' AdamW: are BCN's estimates behind a batch's own statistics there too,
# and which update rate do they need?
_base_ = './segmentation_rate_steps.py'
common = dict(separable_ws=True, zoo_optimizer=True, one_pass=True)
bcn = dict(method='BCN+WS', images=1)
blocks = [
    dict(bcn, update_rate=[0.0006, 0.00625, 0.03]),
    dict(bcn, update_rate=0.03, scheduled=True),  # follows the learning rate
    dict(method='GN+WS', images=1),
    dict(method=['BN', 'BCN-large+WS'], images=16),
]
tune = dict(lr=[0.3, 0.6, 1.2, 2.4])

report = dict(rows=['method', 'update_rate', 'scheduled'], dots=True)
