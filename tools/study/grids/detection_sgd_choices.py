# What detection_sgd.py did not grant its rivals: clipped gradients to frozen
# BN, whose heads have no normalization, and to MABN the window of 32 images
# that its authors have.
_base_ = './detection_sgd.py'
blocks = [
    dict(method='BN-frozen', images=1, clip_grad=10),
    dict(method='MABN+CenConv', images=1, simulated_batch_size=32),
]
tune = dict(lr=[0.02, 0.035, 0.06])

report = dict(rows=['method', 'clip_grad', 'simulated_batch_size'], compare=[])
