# BCN's update rate at one image, two images a step, early in training.
_base_ = './centring.py'
blocks = [
    dict(method='BCN+WS', images=1, update_rate=[0.002, 0.00625, 0.02, 0.05]),
]

report = dict(columns='update_rate', columns_name='update rate r')
