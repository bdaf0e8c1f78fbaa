# The rows of classification.py that are compared, with ten new seeds.
_base_ = './classification.py'
blocks = [
    dict(method='BCN+WS', images=1),
    dict(method='GN+WS', images=32),  # as at any number
    dict(method=['BN', 'BN+WS', 'BCN-large+WS'], images=32),
]
seeds = list(range(5, 15))
tune = dict(tie=0.5)

report = dict(
    compare=[
        [dict(method='BCN+WS', images=1), dict(method='GN+WS', images=32)],
        [dict(method='BCN+WS', images=1), dict(method='BN', images=32)],
        [dict(method='BCN+WS', images=1), dict(method='BN+WS', images=32)],
        [
            dict(method='BCN+WS', images=1),
            dict(method='BCN-large+WS', images=32),
        ],
        [
            dict(method='BCN-large+WS', images=32),
            dict(method='BN+WS', images=32),
        ],
        [
            dict(method='BCN-large+WS', images=32),
            dict(method='GN+WS', images=32),
        ],
    ],
)
