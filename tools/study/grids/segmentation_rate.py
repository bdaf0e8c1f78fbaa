# BCN's update rate in segmentation.py, the learning rate tuned for each, so
# that the tuning scenes choose the rate as well.
_base_ = './segmentation.py'
bcn = dict(method='BCN+WS', images=1)
blocks = [dict(bcn, update_rate=[0.0006, 0.00625, 0.02, 0.06])]

report = dict(rows=['method', 'update_rate'])
