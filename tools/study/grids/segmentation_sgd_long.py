# segmentation_sgd.py trained three times as long, at both learning rates: is
# it the short training that wants estimates to be fast?
_base_ = './segmentation_sgd.py'
common = dict(steps=600)
lr = [0.6, 1.2]
blocks = [
    dict(method='BCN+WS', images=1, update_rate=[0.0006, 0.00625], lr=lr),
    dict(method='GN+WS', images=1, lr=lr),
    dict(method=['BN', 'BCN-large+WS'], images=16, lr=lr),
]
seeds = [0, 1]
tune = None

report = dict(
    rows=['images', 'method', 'update_rate'],
    columns='lr',
    columns_name='learning rate',
    each_seed=True,
)
