_base_ = './segmentation_separable_steps.py'
common = dict(separable_ws=True, one_pass=True, lr=1.8e-2)
blocks = [
    dict(method='BCN+WS', images=1, update_rate=[0.0006, 0.00625]),
]
seeds = [0, 1]
tune = None

report = dict(rows=['method', 'update_rate'])
