# BCN's update rate in update_rate.py at one image, trained for a third as long
# and annealed, as the package does.
_base_ = './update_rate.py'
common = dict(steps=100, images=1, annealing=True)
methods = ['BCN+WS', 'BCN']
blocks = [dict(method=methods, update_rate=[0.0003, 0.003, 0.03])]
seeds = [0, 1, 2, 3, 4, 5]

report = dict(
    rows='method',
    compare=[
        [
            dict(method=method, update_rate=0.003),
            dict(method=method, update_rate=rate),
        ]
        for method in methods
        for rate in [0.0003, 0.03]
    ],
)
