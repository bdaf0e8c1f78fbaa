# segmentation_sgd.py with new seeds: do averaged statistics of the backward
# pass (grad_averaging) give estimates of one image at a time what the
# statistics of 16 images have?
_base_ = './segmentation_sgd.py'
bcn = dict(method='BCN+WS', images=1, update_rate=0.0006)
fast = dict(bcn, update_rate=0.00625)
large = dict(method='BCN-large+WS', images=16)
fitted = dict(bcn, grad_averaging=[16, 0.05])
blocks = [large, fitted, bcn, fast, dict(method='GN+WS', images=1)]
seeds = [5, 6, 7]
tune = dict(at=dict(grad_averaging={0.05: 16}))

window = dict(bcn, grad_averaging=16)
exponential = dict(bcn, grad_averaging=0.05)
plain = dict(bcn, grad_averaging=None)
report = dict(
    rows=['method', 'update_rate', 'grad_averaging'],
    dots=True,
    compare=[
        [window, plain],
        [window, fast],
        [window, dict(method='GN+WS')],
        [window, large],
        [window, exponential],
    ],
)
