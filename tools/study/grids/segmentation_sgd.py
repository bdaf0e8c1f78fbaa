# segmentation_separable_steps.py with the zoo's optimizer, SGD, instead of the
# digits' AdamW: are BCN's estimates behind a batch's own statistics there too?
# Some trainings fail at the higher learning rates: two seeds to choose them,
# five to judge.
_base_ = './segmentation_rate_steps.py'
common = dict(separable_ws=True, zoo_optimizer=True, one_pass=True)
blocks = [
    dict(method='BCN+WS', images=1, update_rate=[0.0006, 0.00625]),
    dict(method='GN+WS', images=1),
    dict(method=['BN', 'BCN-large+WS'], images=16),
]
seeds = [0, 1, 2, 3, 4]
tune = dict(lr=[0.3, 0.6, 1.2, 2.4], seeds=[100, 101])
