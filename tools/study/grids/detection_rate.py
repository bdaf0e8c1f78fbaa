# A slower update rate in detection.py, which has 0.00625.
_base_ = './detection.py'
bcn = dict(method='BCN+WS', images=1)
blocks = [
    dict(bcn, lr=3e-3, update_rate=0.00625),
    dict(bcn, lr=[1e-3, 3e-3], update_rate=0.0006),
]
tune = None

report = dict(rows=['method', 'lr', 'update_rate'])
