"""Configs with mistakes: each ends in a message with a name in it."""

from .bench import Bench, attack

GROUP = 'Configs'
BACKBONE = 'model = dict(backbone=dict({}))\n'
MICRO_BATCH = (
    'from wsbcn_mm import micro_batch_model\n'
    'model = micro_batch_model(_base_.model, {})\n'
)

# What the user writes, and what must be in the message.
NORMS = {
    'norm_cfg=dict(num_group=32)': ['num_group', "'num_groups'"],
    "norm_cfg=dict(type='BCNorm')": ['BCNorm', "'BCN'"],
    "norm_cfg=dict(type='bcn')": ["'bcn'", 'norm_cfg'],
    "norm_cfg='BCN'": ['norm_cfg', r"dict\(type='BCN'\)"],
    'norm_cfg=dict(_delete_=True, num_groups=4)': ['norm_cfg', 'type'],
    'norm_cfg=dict(num_groups=0)': ['BCN', 'num_groups', 'positive'],
    "norm_cfg=dict(num_groups='32')": ['BCN', 'num_groups', "'32'"],
    'norm_cfg=dict(momentum=2)': ['BCN', 'momentum', '2'],
    "norm_cfg=dict(channel_affine='chanel')": ['channel_affine', 'chanel'],
    "norm_cfg=dict(estimate='no')": ['estimate', "'no'"],
    "norm_cfg=dict(type='MABN')": ['num_groups', '_delete_'],
    "norm_cgf=dict(type='BCN')": ['norm_cgf', "'norm_cfg'"],
    "conv_cfg=dict(type='ConvWs')": ['ConvWs', "'ConvWS'"],
    "conv_cfg='ConvWS'": ['conv_cfg', r"dict\(type='ConvWS'\)"],
    "conv_cfg=dict(eps='small')": ['eps'],
    'depth=17': ['17'],
    "type='ResNett'": ['ResNett', "'ResNet'"],
}
CALLS = {
    "norm_cfg='BCN'": ['norm_cfg', r"dict\(type='BCN'"],
    "norm_cfg=dict(type='BCNorm')": ['norm_cfg', 'BCNorm'],
    "norm_cfg=dict(type='BCN', num_group=32)": ['num_group', "'num_groups'"],
    'norm_cfg=dict(num_groups=32)': ['norm_cfg', 'type'],
    "conv_cfg='ConvWS'": ['conv_cfg', r"dict\(type='ConvWS'"],
    "conv_cfg=dict(type='ConvWs')": ['conv_cfg', 'ConvWs'],
    'image_per_gpu=1': ['image_per_gpu', "'images_per_gpu'"],
    'images_per_gpu=0': ['images_per_gpu', '0'],
    "images_per_gpu='2'": ['images_per_gpu', "'2'"],
    'images_per_gpu=32': ['images_per_update', '32'],
    'pretrained=3': ['pretrained', '3'],
    "convert='yes'": ['convert', "'yes'"],
}
RUNS = {
    "custom_hooks = [dict(type='SyncEstimatesHok')]": [
        'SyncEstimatesHok',
        "'SyncEstimatesHook'",
    ],
    "custom_hooks = [dict(type='SyncEstimatesHook', intervall=3)]": [
        'intervall',
        "'interval'",
    ],
    "custom_hooks = [dict(type='SyncEstimatesHook', interval=0)]": [
        'interval',
        'positive',
    ],
    "custom_hooks = ['SyncEstimatesHook']": ['hook', 'SyncEstimatesHook'],
    "default_hooks = dict(checkpoint=dict(type='ChekpointHook'))": [
        'ChekpointHook',
        "'CheckpointHook'",
    ],
    "optim_wrapper = dict(optimizer=dict(type='AdamWW'))": [
        'AdamWW',
        "'AdamW'",
    ],
    'optim_wrapper = dict(optimizer=dict(learning_rate=1))': [
        'learning_rate',
        'optim_wrapper.optimizer',
    ],
    'optim_wrapper = dict(clipgrad=dict(max_norm=1))': [
        'clipgrad',
        "'clip_grad'",
    ],
    "train_cfg = dict(type='EpochTrainLoop')": [
        'EpochTrainLoop',
        "'EpochBasedTrainLoop'",
    ],
    "train_dataloader['dataset'].update(type='CocoDatset')": [
        'CocoDatset',
        "'CocoDataset'",
    ],
    "train_dataloader['dataset'].update(annfile='x')": [
        'annfile',
        "'ann_file'",
    ],
    "train_dataloader.update(batch_size='1')": ['batch_size'],
    "default_scope = 'mmdett'": ['mmdett', "'mmdet'"],
    "default_hooks = dict(checkpoint='CheckpointHook')": ['CheckpointHook'],
}


def check_all(bench: Bench, mistakes: dict, form: str, norm: str) -> None:
    for mistake, parts in mistakes.items():
        with bench.survives(mistake):
            config = bench.config(form.format(mistake), 'mistake.py', norm)
            work_dir = bench.folder / 'run'
            bench.train(config, work_dir).refuses(*parts)


@attack(GROUP, 'mistakes in norm_cfg, conv_cfg and the model', slow=True)
def norms(bench: Bench) -> None:
    check_all(bench, NORMS, BACKBONE, 'bcn-ws')


@attack(GROUP, 'mistakes in the call of micro_batch_model')
def calls(bench: Bench) -> None:
    check_all(bench, CALLS, MICRO_BATCH, 'bn')


@attack(GROUP, 'mistakes in hooks, optimizers, loaders and loops', slow=True)
def runs(bench: Bench) -> None:
    check_all(bench, RUNS, '{}\n', 'bcn-ws')
    with bench.survives('custom_hook = [...]: trains, and the log says it'):
        config = bench.config(
            'custom_hook = []\ntrain_cfg = dict(max_epochs=1)\n', 'unread.py'
        )
        run = bench.train(config, bench.folder / 'unread').succeeds()
        run.says("Nothing reads 'custom_hook'.*'custom_hooks'", times=1)
    with bench.survives('--cfg-options of a key that is not there'):
        bench.train(
            bench.config(),
            bench.folder / 'run',
            '--cfg-options',
            'model.backbone.norm_cfg.num_group=4',
        ).refuses('num_group', "'num_groups'")
