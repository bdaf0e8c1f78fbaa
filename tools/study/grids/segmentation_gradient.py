# segmentation_sgd.py with new seeds: do averaged statistics of the backward
# pass (grad_averaging) give estimates of one image at a time what the
# statistics of 16 images have? Each at the learning rate that was found there;
# with grad_averaging at that of the statistics of 16 images.
_base_ = './segmentation_sgd.py'
bcn = dict(method='BCN+WS', images=1, update_rate=0.0006)
blocks = [
    dict(bcn, lr=1.2, grad_averaging=16),
    dict(method='BCN-large+WS', images=16, lr=1.2),
    dict(bcn, lr=0.6),
    dict(bcn, lr=1.2, update_rate=0.00625),
    dict(method='GN+WS', images=1, lr=1.2),
]
seeds = [5, 6]
tune = None

fitted = dict(bcn, grad_averaging=16)
report = dict(
    rows=['method', 'update_rate', 'grad_averaging'],
    each_seed=True,
    digits=1,
    compare=[
        [fitted, dict(bcn, grad_averaging=None)],
        [fitted, dict(bcn, update_rate=0.00625)],
        [fitted, dict(method='GN+WS')],
        [fitted, dict(method='BCN-large+WS')],
    ],
)
