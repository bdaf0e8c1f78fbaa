# What fails when BN is trained one image at a time, training or evaluation?
# Running averages, population statistics and each test image's own statistics,
# beside Instance Normalization, which has the latter by definition.
_base_ = './classification.py'
blocks = [
    dict(method=['BN', 'BN+WS'], images=1),
    dict(method=['IN', 'IN+WS'], images=1),
]
seeds = list(range(5, 15))
tune = dict(lr=[0.03, 0.1, 0.3], seeds=[100, 101], tie=0.5)

report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    rows='method',
    columns='images',
    columns_name='images per normalization batch',
    also=dict(
        accuracy_precise='BN evaluated with statistics over 2,000 scenes',
        accuracy_own='BN evaluated with the statistics of as many test '
        'images at a time as in training',
    ),
)
