# How much the scenes differ from one another: 0, in digit and texture only;
# 1, strongly in light, contrast and level.
task = 'classification'
common = dict(steps=300, batch_size=32, num_groups=8)
variation = [0.0, 0.5, 1.0]
blocks = [
    dict(method=['BN', 'GN', 'GN+WS'], images=32, variation=variation),
    dict(method='BN', images=1, variation=variation),
    dict(method='BCN+WS', images=1, variation=variation, annealing=False),
]
seeds = [0, 1, 2]
tune = dict(
    lr=[0.03, 0.1, 0.3],
    seeds=[100],
    at=dict(variation={0.0: 0.5, 1.0: 0.5}),
)

report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    rows=['method', 'images'],
    columns='variation',
    columns_name='variation of light and contrast',
    error=True,
)
