# Accuracy against images per normalization batch; the optimizer's batch is 32
# throughout. GN sees one image at any batch size.
task = 'classification'
common = dict(steps=300, batch_size=32, num_groups=8, variation=0.5)
images = [1, 2, 4, 8, 16, 32]
blocks = [
    dict(method=['BN', 'BCN+WS'], images=images),
    dict(method=['GN', 'GN+WS', 'BCN-large+WS'], images=32),
    dict(method=['BN+WS', 'BCN'], images=images),
    dict(method='MABN+CenConv', images=images),
    dict(method='BCN+WS', channel_affine='channel', images=[1, 32]),
]
seeds = [0, 1, 2, 3, 4]

# Tuned at 1, 2 and 32 images; those between take the one of a neighbour. With
# one seed some take a rate at which others collapse.
tune = dict(
    lr=[0.03, 0.1, 0.3],
    seeds=[100, 101],
    at=dict(images={4: 2, 8: 32, 16: 32}),
)

report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    rows=['method', 'channel_affine'],
    columns='images',
    columns_name='images per normalization batch',
    error=True,
    median=True,  # in the plot: a few trainings collapse
    also=dict(
        accuracy_precise='BN evaluated with statistics over 2,000 scenes'
    ),
    everywhere=['GN', 'GN+WS'],
)
