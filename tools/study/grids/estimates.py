# How BCN's estimates begin: at mean 0 and variance 1 with the rate r (plain),
# as averages until those are slower than r (annealed), or as averages
# throughout; or they stay there (never), which is a Group Normalization with
# an affine of the channels before it: what estimates are good for at all.
task = 'classification'
common = dict(
    steps=300, batch_size=32, num_groups=8, variation=0.5, lr=0.1, images=1
)
method = ['BCN+WS', 'BCN']
blocks = [
    dict(variant='never', update_rate=0.0, annealing=False, method=method),
    dict(variant='plain', annealing=False, method=method),
    dict(variant='annealed', annealing=True, method=method),
    dict(variant='average', average=True, annealing=False, method=method),
]
seeds = [0, 1, 2]

report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    rows=['method', 'variant'],
    columns='images',
    columns_name='images per normalization batch',
)
