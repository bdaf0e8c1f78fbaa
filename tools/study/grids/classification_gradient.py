# Averaged statistics of the backward pass (grad_averaging) at one image in
# classification.py, with and without WS.
_base_ = './classification.py'
bcn = dict(method=['BCN', 'BCN+WS'], images=1)
blocks = [bcn, dict(bcn, grad_averaging=0.05)]
seeds = list(range(5, 15))

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
