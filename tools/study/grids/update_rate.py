# BCN's update rate r against the images per normalization batch; scheduled: r
# is what it begins with, and follows the learning rate's warm-up and cosine.
task = 'classification'
common = dict(
    method='BCN+WS',
    steps=300,
    batch_size=32,
    num_groups=8,
    variation=0.5,
    lr=0.1,
    annealing=False,
)
blocks = [
    dict(
        images=[1, 32],
        update_rate=[0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3],
    ),
    dict(images=1, scheduled=True, update_rate=[0.003, 0.03, 0.1, 0.3]),
]
seeds = [0, 1, 2]

report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    rows=['images', 'scheduled'],
    columns='update_rate',
    columns_name='update rate r',
    error=True,
)
