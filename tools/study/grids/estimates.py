# How BCN's estimates begin: at mean 0 and variance 1 with the rate r (plain),
# as an average of what was seen until that is slower than r (annealed), or as
# an average throughout (average); r by the package's rule, ten times
# slower, or 0, which is a Group Normalization with an affine of the channels
# before it: what the estimates are good for at all.
task = 'classification'
common = dict(steps=300, batch_size=32, num_groups=8, variation=0.5, lr=0.1)
method = ['BCN+WS', 'BCN']
blocks = [
    dict(variant='never', update_rate=0.0, method=method, images=1),
    dict(variant='plain', method=method, images=[1, 32]),
    dict(variant='annealed', annealing=True, method=method, images=[1, 32]),
    dict(variant='average', average=True, method=method, images=[1, 32]),
    dict(
        variant='plain, r / 10', images=1, update_rate=0.1 / 320, method=method
    ),
    dict(
        variant='annealed, r / 10',
        annealing=True,
        images=1,
        update_rate=0.1 / 320,
        method=method,
    ),
]
seeds = [0, 1, 2]

report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    rows=['method', 'variant'],
    columns='images',
    columns_name='images per normalization batch',
)
