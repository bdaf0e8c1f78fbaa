# BCN's update rate in detection_pretrained.py, the learning rate tuned for
# each, so that the tuning scenes choose the rate as well.
_base_ = './detection_pretrained.py'
bcn = dict(method='BCN+WS', images=1)
blocks = [
    dict(bcn, update_rate=[0.0006, 0.00625, 0.06]),
    dict(bcn, images=2, update_rate=0.00125),
]

report = dict(rows=['method', 'update_rate'])
