# segmentation_adamw.py trained three times as long: does the update rate still
# matter?
_base_ = './segmentation_adamw.py'
common = dict(steps=600)
blocks = [dict(method='BCN+WS', images=1, update_rate=[0.0006, 0.00625])]
seeds = [0, 1]
