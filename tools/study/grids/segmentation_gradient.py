# segmentation_sgd.py with new seeds: do averaged statistics of the backward
# pass give estimates of one image at a time what the statistics of 16 have?
_base_ = './segmentation_sgd.py'
blocks = [
    dict(method='BCN-large+WS', images=16),
    dict(method='BCN+WS', images=1, update_rate=[0.0006, 0.00625]),
    dict(method='GN+WS', images=1),
]
seeds = [5, 6, 7]
