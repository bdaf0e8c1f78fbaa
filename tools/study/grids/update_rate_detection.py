# BCN's update rate at one image, two images a step, from a pretrained
# backbone; 0.00625 is what micro_batch_model chooses.
_base_ = './detection_pretrained.py'
blocks = [
    dict(
        method='BCN+WS',
        images=1,
        lr=3e-3,
        update_rate=[0.002, 0.00625, 0.02, 0.06],
    ),
]
tune = None

report = dict(columns='update_rate', columns_name='update rate r')
