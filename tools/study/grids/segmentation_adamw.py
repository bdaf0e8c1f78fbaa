# segmentation_sgd_rate.py with the digits' AdamW: update rates at the learning
# rate that was found in segmentation_separable_steps.py, and one that follows
# it.
_base_ = './segmentation_sgd_rate.py'
common = dict(zoo_optimizer=False, lr=1.8e-2)
bcn = dict(method='BCN+WS', images=1)
blocks = [
    dict(bcn, update_rate=[0.0006, 0.002, 0.00625, 0.03]),
    dict(bcn, update_rate=0.03, scheduled=True),
]
tune = None
