# Which trainings collapse at high learning rates, at 32 images?
task = 'classification'
common = dict(steps=300, batch_size=32, num_groups=8, variation=0.5, images=32)
blocks = [
    dict(
        method=['BN', 'BN+WS', 'GN+WS', 'BCN+WS', 'BCN-large+WS'],
        lr=[0.1, 0.3, 0.6],
    ),
    # A group's pair takes the gradients of all its channels, a channel's not.
    dict(
        method=['BCN+WS', 'BCN-large+WS'],
        channel_affine='channel',
        lr=[0.1, 0.3, 0.6],
    ),
]
seeds = [0, 1, 2]

report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    each_seed=True,  # some collapse
    digits=1,
    rows=['method', 'channel_affine'],
    columns='lr',
    columns_name='learning rate',
)
