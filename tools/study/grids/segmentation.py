# DeepLabV3+ from the backbone of a classifier, at one image, where BN cannot
# run: its image pooling leaves a single value per channel. At two it can.
task = 'openmmlab'
common = dict(
    config='configs/digits/deeplabv3plus_r18-slim_bn_1xb1-4k_digits-160x160.py',
    steps=400,
    batch_size=4,
    num_train=600,
    num_val=300,
    pretrained=True,
)
blocks = [
    dict(method=['BN', 'GN', 'GN+WS'], images=1),
    dict(method='BCN+WS', images=1, update_rate=0.00625),
    dict(method='MABN+CenConv', images=1),
    dict(method='BN', images=2),
]
seeds = [0, 1, 2]
tune = dict(lr=[1e-3, 3e-3, 1e-2], seeds=[100])

report = dict(
    metric='mIoU',
    metric_name='mIoU',
    rows='method',
    columns='images',
    columns_name='images per normalization batch',
)
