# segmentation_sgd_rate.py with five seeds to judge and two to choose between
# the learning rates that were best there: at the higher some trainings fail.
_base_ = './segmentation_sgd_rate.py'
blocks = [
    dict(method='BCN+WS', images=1, update_rate=[0.0006, 0.002, 0.00625]),
    dict(method='GN+WS', images=1),
    dict(method=['BN', 'BCN-large+WS'], images=16),
]
seeds = [0, 1, 2, 3, 4]
tune = dict(lr=[0.6, 1.2], seeds=[100, 101])

slow = dict(method='BCN+WS', images=1, update_rate=0.0006)
fast = dict(method='BCN+WS', images=1, update_rate=0.00625)
large = dict(method='BCN-large+WS')
report = dict(
    compare=[
        [slow, dict(method='GN+WS')],
        [fast, dict(method='GN+WS')],
        [fast, slow],
        [slow, dict(method='BN')],
        [large, slow],
        [large, fast],
        [large, dict(method='GN+WS')],
        [large, dict(method='BN')],
    ],
)
