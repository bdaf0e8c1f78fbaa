# Averaged statistics of the backward pass (grad_averaging) at one image in
# classification.py, with and without WS, all at the learning rate that was
# found there for BCN without them.
_base_ = './classification.py'
common = dict(lr=0.1)
bcn = dict(method=['BCN', 'BCN+WS'], images=1)
blocks = [dict(bcn, grad_averaging=0.05), bcn]
seeds = list(range(5, 15))
tune = None

report = dict(
    rows=['method', 'grad_averaging'],
    compare=[
        [
            dict(method=method, grad_averaging=0.05),
            dict(method=method, grad_averaging=None),
        ]
        for method in ['BCN', 'BCN+WS']
    ],
)
