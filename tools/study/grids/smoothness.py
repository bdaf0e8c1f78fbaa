# The loss along the gradient direction, with and without WS.
task = 'smoothness'
common = dict(
    steps=300, batch_size=32, num_groups=8, variation=0.5, every=15, lr=0.1
)
blocks = [
    dict(method=['BN', 'BN+WS', 'GN', 'GN+WS'], images=32),
    dict(method='BCN+WS', annealing=False, images=32),
]
seeds = [0, 1, 2]

report = dict(
    metric='lipschitz',
    metric_name="the gradient's Lipschitz constant, estimated",
    also=dict(
        loss_range='range of the loss',
        gradient_change='relative change of the gradient',
    ),
    rows='method',
    columns='images',
    columns_name='images per normalization batch',
    curves=dict(
        loss_range='range of the loss',
        gradient_change='relative change of the gradient',
        lipschitz='gradient change per distance',
    ),
    log=True,
)
