# The whole family at one learning rate, untuned: a first look.
task = 'classification'
common = dict(steps=300, batch_size=32, num_groups=8, variation=0.5, lr=0.1)
blocks = [
    dict(
        method=['BN', 'BN+WS', 'BGN', 'BGN+WS', 'BCN', 'BCN+WS'],
        images=[1, 2, 32],
    ),
    dict(method=['MABN+CenConv'], images=[1, 2, 32]),
    dict(method=['GN', 'GN+WS'], images=32),
]
seeds = [0, 1, 2]

report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    rows='method',
    columns='images',
    columns_name='images per normalization batch',
    also=dict(
        accuracy_precise='BN evaluated with statistics over 2,000 scenes'
    ),
    error=True,
    everywhere=['GN', 'GN+WS'],
)
