# DeepLabV3+ small enough for two CPU cores, with the zoo's BN.
_base_ = [
    'mmseg::_base_/models/deeplabv3plus_r50-d8.py',
    '../_base_/datasets/digits_semantic.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['wsbcn_mm'], allow_failed_imports=False)

norm_cfg = dict(type='BN')
# Five of six pixels are ground, and all of them is what it would say for long.
class_weight = [0.1, *[1.0] * 10]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    pretrained=None,
    # The stem of the classifier's ResNet, so that its weights fit.
    backbone=dict(
        type='ResNet',
        depth=18,
        stem_channels=16,
        base_channels=16,
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        in_channels=128,
        channels=64,
        dilations=(1, 2, 4, 6),
        c1_in_channels=16,
        c1_channels=16,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(
        in_channels=64,
        channels=32,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
)

max_iters = 4000
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=max_iters, val_interval=1000
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        begin=0,
        end=max_iters,
        T_max=max_iters,
        eta_min_ratio=0.01,
        by_epoch=False,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=1)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=1000, max_keep_ckpts=1
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
randomness = dict(seed=0)
