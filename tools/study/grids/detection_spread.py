# The same as detection.py at one image, against how much the scenes differ.
_base_ = './detection.py'
spread = [0.5, 1.0]
blocks = [
    dict(method=['BN', 'GN', 'GN+WS'], images=1, spread=spread),
    dict(method='BCN+WS', images=1, update_rate=0.00625, spread=spread),
]
tune = dict(at=dict(spread={1.0: 0.5}))

report = dict(
    dots=False,
    columns='spread',
    columns_name='spread of the scenes',
)
