# BCN's update rate in segmentation.py, the learning rate tuned for each, so
# that the tuning scenes choose the rate as well. Without one: 0.00625, the
# rate of methods.py.
_base_ = './segmentation.py'
bcn = dict(method='BCN+WS', images=1)
blocks = [dict(bcn, update_rate=[0.0006, 0.02, 0.06]), bcn]

report = dict(rows=['method', 'update_rate'])
