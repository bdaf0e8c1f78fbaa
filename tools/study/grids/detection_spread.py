# The same as detection.py at one image, against how much the scenes differ.
_base_ = './detection.py'
blocks = [
    dict(
        method=['BN', 'GN', 'GN+WS', 'BCN+WS'],
        images=1,
        spread=[0.5, 1.0],
    ),
]
tune = dict(at=dict(spread={1.0: 0.5}))

report = dict(columns='spread', columns_name='spread of the scenes')
