# Channels that ReLU turns off, and how far each channel is from the
# statistics that BN gives it, over a training of one image at a time (BN: of
# 32, the reference).
task = 'classification'
common = dict(
    steps=300, batch_size=32, num_groups=8, variation=0.5, monitor=15
)
blocks = [
    dict(method=['GN', 'GN+WS'], images=1, lr=0.1),
    dict(method=['BCN+WS', 'BCN'], images=1, lr=0.1, annealing=False),
    dict(method='BN', images=32, lr=0.1),
]
seeds = [0, 1, 2]

report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    rows='method',
    columns='images',
    columns_name='images per normalization batch',
    curves=dict(
        off='channels turned off (share)',
        distance="distance from BN's statistics",
    ),
)
