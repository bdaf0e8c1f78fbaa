# BCN's update rate in update_rate.py at one image, trained for a third as long.
_base_ = './update_rate.py'
common = dict(steps=100, images=1)
blocks = [
    dict(
        method=['BCN+WS', 'BCN'],
        lr=[0.03, 0.1],
        update_rate=[0.0003, 0.003, 0.03],
    )
]
seeds = list(range(10))

report = dict(
    rows=['method', 'lr'],
    compare=[
        [
            dict(method=method, lr=0.1, update_rate=0.003),
            dict(method=method, lr=0.1, update_rate=rate),
        ]
        for method in ['BCN+WS', 'BCN']
        for rate in [0.0003, 0.03]
    ],
)
