# Which trainings collapse at high learning rates, at 32 images? Does an affine
# per channel help, or a limit to the norm of the gradient?
task = 'classification'
common = dict(steps=300, batch_size=32, num_groups=8, variation=0.5, images=32)
lr = [0.1, 0.3, 0.6]
bcn = dict(annealing=False, lr=lr)
large = ['BCN+WS', 'BCN-large+WS']
blocks = [
    dict(method=['BN', 'BN+WS', 'GN+WS'], lr=lr),
    dict(bcn, method=large),
    # A group's pair takes the gradients of all its channels, a channel's not.
    dict(bcn, method=large, channel_affine='channel'),
    dict(bcn, method='BCN+WS', clip_grad=[1.0, 10.0]),
]
seeds = [0, 1, 2]

report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    each_seed=True,  # some collapse
    digits=1,
    rows=['method', 'channel_affine', 'clip_grad'],
    columns='lr',
    columns_name='learning rate',
)
