# Which half of Weight Standardization costs early in training from scratch,
# centring the filters (CWN, WS) or scaling them (WN, CWN, WS)? The losses of
# the last hundred of the first 500 images.
_base_ = './detection.py'
common = dict(steps=250, num_val=20, lr=1e-3)
blocks = [
    dict(method=['GN', 'GN+WN', 'GN+CWN', 'GN+WS'], images=1),
    dict(method=['BCN+WN', 'BCN+WS'], images=1, update_rate=0.00625),
]
tune = None

report = dict(
    metric='loss',
    metric_name='training loss',
    also=dict(
        _delete_=True,
        loss_rpn_cls='objectness loss',
        loss_mask='mask loss',
    ),
)
