# BCN's update rate where an optimizer step has two images, as in detection.
task = 'classification'
common = dict(
    method='BCN+WS',
    steps=2400,
    batch_size=2,
    num_groups=8,
    variation=0.5,
    lr=0.01,
)
blocks = [
    dict(images=1, update_rate=[0.1, 0.05, 0.02, 0.00625, 0.002, 0.0006]),
]
seeds = [0, 1, 2]

report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    rows='images',
    columns='update_rate',
    columns_name='update rate r',
    error=True,
)
