# BCN's update rate where an optimizer step has two images, as in detection.
_base_ = './update_rate.py'
common = dict(steps=2400, batch_size=2, lr=0.01)
blocks = [
    dict(images=1, update_rate=[0.1, 0.05, 0.02, 0.00625, 0.002, 0.0006]),
]
