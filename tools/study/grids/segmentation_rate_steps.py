# segmentation_rate.py with 16 images a step instead of four, as schedules for
# many GPUs have: is it images or steps that BCN's memory should be counted in?
# And how do GN and a BN that sees all 16 do then?
_base_ = './segmentation.py'
common = dict(batch_size=16, steps=200)
bcn = dict(method='BCN+WS', images=1)
blocks = [
    dict(bcn, update_rate=[0.0006, 0.00625]),
    dict(method='GN+WS', images=1),
    dict(method='BN', images=16),
]
tune = dict(lr=[3e-3, 5.5e-3, 1e-2])

report = dict(rows=['method', 'update_rate'])
