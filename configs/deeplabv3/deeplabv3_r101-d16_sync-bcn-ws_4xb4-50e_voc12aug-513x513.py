_base_ = 'mmseg::deeplabv3/deeplabv3_r101-d8_4xb4-40k_voc12aug-512x512.py'
import wsbcn_mm.models  # noqa: F401  registers PointwiseASPPHead
from wsbcn_mm import micro_batch_model

custom_imports = dict(
    imports=['wsbcn_mm', 'wsbcn_mm.models'], allow_failed_imports=False
)
crop_size = (513, 513)
model = micro_batch_model(
    _base_.model,
    # The statistics of the 16 images of all GPUs, with gradients.
    norm_cfg=dict(type='SyncBCN', num_groups=32, estimate=False, momentum=0.1),
    images_per_gpu=16,
    images_per_update=16,
    pretrained='https://cs.jhu.edu/~syqiao/BatchChannelNormalization/'
    'rn101-bcn-ws.pth.tar',
)
model.data_preprocessor.update(size=crop_size, test_cfg=dict(size=crop_size))
model.backbone.update(
    type='ResNet', strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)
)
model.decode_head.update(
    type='PointwiseASPPHead',
    channels=256,
    dilations=(1, 6, 12, 18),
    dropout_ratio=0,
    align_corners=True,
)
model.auxiliary_head = None

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    # From half to twice the size of the image, evenly in the logarithm.
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='Resize', scale_factor=2 ** (i / 8), keep_ratio=True)]
            for i in range(-8, 9)
        ],
    ),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = _base_.train_dataloader
for dataset in train_dataloader.dataset.datasets:
    dataset.pipeline = train_pipeline
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=0.007, weight_decay=1e-4))
# 50 epochs of 662 steps.
train_cfg = dict(max_iters=33100, val_interval=3310)
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(eta_min=0, end=33100)
default_hooks = dict(checkpoint=dict(interval=3310))
