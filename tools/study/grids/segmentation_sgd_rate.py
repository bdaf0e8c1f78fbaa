# Faster update rates in segmentation_sgd.py, constant and from there down with
# the learning rate.
_base_ = './segmentation_sgd.py'
bcn = dict(method='BCN+WS', images=1)
blocks = [
    dict(bcn, update_rate=[0.0006, 0.00625, 0.03]),
    dict(bcn, update_rate=0.03, scheduled=True),
]
seeds = [0, 1, 2]
tune = dict(seeds=[100])

report = dict(rows=['method', 'update_rate', 'scheduled'])
