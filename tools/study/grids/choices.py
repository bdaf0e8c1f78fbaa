# BCN's other choices, one at a time, at one image and at 32.
task = 'classification'
common = dict(steps=300, batch_size=32, variation=0.5, lr=0.1)
bcn = [
    dict(method='BCN+WS', num_groups=[1, 2, 4, 8, 16]),
    dict(method='BCN+WS', num_groups=[1, 8], channel_affine='channel'),
    dict(method='BCN', num_groups=[2, 8]),
    dict(method='BCN+WS', num_groups=8, zero_init=True),
    dict(
        method='BCN+WS',
        num_groups=8,
        channel_affine='channel',
        zero_init=True,
    ),
]
blocks = [
    dict(choice, images=images, update_rate=0.1 * images / 32, annealing=False)
    for choice in bcn
    for images in (1, 32)
]
blocks += [
    dict(method='GN+WS', num_groups=[1, 2, 4, 8, 16], images=32),
    dict(method=['BN', 'GN+WS'], num_groups=8, zero_init=True, images=32),
]
seeds = [0, 1, 2]

report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    each_seed=True,  # some collapse
    digits=1,
    rows=['method', 'num_groups', 'channel_affine', 'zero_init'],
    columns='images',
    columns_name='images per normalization batch',
)
