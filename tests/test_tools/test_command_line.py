"""What the tools say when something is missing, and what they build."""

import argparse
import logging
import os
import os.path as osp
import subprocess
import sys

import pytest
from mmcv.cnn import build_norm_layer
from mmengine.config import Config, ConfigDict

from wsbcn_mm import SyncEstimatesHook
from wsbcn_mm.engine import command_line
from wsbcn_mm.engine.command_line import (
    UsageError,
    check_amp,
    check_checkpoint,
    check_datasets,
    check_pretrained,
    check_scaled_lr,
    check_testable,
    check_update_rate,
    load_config,
)

ROOT = osp.abspath(osp.join(osp.dirname(__file__), '../..'))
DIGITS = osp.join(
    ROOT, 'configs/digits/mask-rcnn_r18-slim_fpn_bcn-ws_1xb1-5e_digits.py'
)


def arguments(config, **given):
    values = dict(
        config=config,
        work_dir=None,
        cfg_options=None,
        launcher='none',
        local_rank=0,
    )
    return argparse.Namespace(**{**values, **given})


def written(tmp_path, text):
    path = tmp_path / 'config.py'
    path.write_text(text)
    return str(path)


def test_missing_config_suggests_similar_ones(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError, match='Did you mean .*1xb1-5e_digits.py'):
        load_config(arguments('mask-rcnn_r18-slim_fpn_bcn-ws_1xb1_digits.py'))


def test_unknown_config_is_named():
    with pytest.raises(UsageError, match="no config 'zzz.py'.$"):
        load_config(arguments('zzz.py'))


def test_config_of_a_missing_package(tmp_path):
    path = written(
        tmp_path, "custom_imports = dict(imports=['no_such_package'])\n"
    )
    with pytest.raises(UsageError, match='needs a package.*no_such_package'):
        load_config(arguments(path))


BASE = "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n"
IMPORT = 'from wsbcn_mm import micro_batch_model\n'
CALL = 'model = micro_batch_model(_base_.model)\n'


@pytest.mark.filterwarnings('ignore:micro_batch_model')
@pytest.mark.parametrize(
    'text, message',
    [
        (IMPORT + CALL, "config.py: _base_ = '...' must be the first line"),
        (IMPORT + BASE + CALL, 'Imports, .* come after it'),
        (
            BASE + IMPORT + CALL[:-2],
            r"config.py, line 3: ('\(' was never|unexpected EOF)",
        ),
        (
            BASE + IMPORT + CALL.replace(')', ', images_per_gpu=32)'),
            '^micro_batch_model: images_per_update counts',
        ),
        (
            BASE + IMPORT + CALL.replace(')', ', image_per_gpu=2)'),
            "^micro_batch_model.* 'image_per_gpu'",
        ),
        (BASE.replace('_1x', '_0x'), 'retinanet_r50_fpn_0x_coco.py'),
    ],
    ids=['no base', 'import first', 'syntax', 'value', 'argument', 'path'],
)
def test_mistakes_in_a_config_are_one_message(tmp_path, text, message):
    with pytest.raises(UsageError, match=message) as error:
        load_config(arguments(written(tmp_path, text)))
    assert error.value.__cause__ is not None


def test_mistakes_in_a_base_name_the_base(tmp_path):
    path = written(tmp_path, "_base_ = './base.py'\n")
    base = tmp_path / 'base.py'
    base.write_text(IMPORT + BASE + CALL)
    with pytest.raises(UsageError, match='base.py: _base_ .* first line'):
        load_config(arguments(path))
    base.write_text('a = (\n')
    with pytest.raises(UsageError, match='a base of .*config.py, line 1'):
        load_config(arguments(path))


def test_other_errors_of_a_config_keep_their_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError):
        load_config(arguments(written(tmp_path, 'a = 1 / 0\n')))


@pytest.mark.parametrize('option', ['foo', 'a=[1,2', 'a=1 config.py'])
def test_bad_options_are_one_message(option, capsys):
    parser = argparse.ArgumentParser()
    command_line.add_common_arguments(parser)
    assert parser.parse_args(['--cfg-options', 'a=1']).cfg_options == {'a': 1}
    with pytest.raises(SystemExit):
        parser.parse_args(['--cfg-options', *option.split()])
    assert 'error: --cfg-options' in capsys.readouterr().err


def test_options_that_do_not_fit(tmp_path):
    path = written(tmp_path, 'a = [1]\nb = 1\n')
    for option in ({'a.3.b': 1}, {'b.c': 1}):
        with pytest.raises(UsageError, match='--cfg-options: '):
            load_config(arguments(path, cfg_options=option))


def test_missing_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmseg', None)
    path = written(tmp_path, "default_scope = 'mmseg'\n")
    with pytest.raises(UsageError, match='pip install mmsegmentation'):
        load_config(arguments(path))


def test_launcher_without_ranks_says_what_to_run(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(UsageError, match='dist_train.sh'):
        load_config(arguments(DIGITS, launcher='pytorch'))


def test_work_dir_is_option_then_config_then_name(tmp_path):
    name = 'mask-rcnn_r18-slim_fpn_bcn-ws_1xb1-5e_digits'
    assert load_config(arguments(DIGITS)).work_dir == f'work_dirs/{name}'
    path = written(tmp_path, "work_dir = 'here'\n")
    assert load_config(arguments(path)).work_dir == 'here'
    assert load_config(arguments(path, work_dir='there')).work_dir == 'there'


def test_cfg_options_are_merged():
    cfg = load_config(
        arguments(DIGITS, cfg_options={'model.backbone.depth': 34})
    )
    assert cfg.model.backbone.depth == 34


def test_missing_digit_scenes_say_how_to_make_them():
    cfg = load_config(arguments(DIGITS))
    cfg.train_dataloader.dataset.data_root = 'no/digit_scenes/'
    with pytest.raises(UsageError) as error:
        check_datasets(cfg, 'train_dataloader')
    for part in (
        "no data set at 'no/digit_scenes/'",
        'CocoDataset',
        'train_dataloader.dataset.data_root=',
        'tools/dataset_converters/digit_scenes.py',
    ):
        assert part in str(error.value)


def test_missing_annotations_of_a_wrapped_dataset(tmp_path):
    """The key that is told is one that --cfg-options takes."""
    inner = dict(
        type='CocoDataset', data_root=str(tmp_path), ann_file='a.json'
    )
    wrapped = dict(type='RepeatDataset', times=2, dataset=inner)
    both = dict(type='ConcatDataset', datasets=[wrapped])
    cfg = Config(dict(train_dataloader=dict(dataset=both)))
    load_config(arguments(DIGITS))
    with pytest.raises(UsageError, match='annotation file.*a.json') as error:
        check_datasets(cfg, 'train_dataloader')
    key = 'train_dataloader.dataset.datasets.0.dataset.ann_file'
    assert f'--cfg-options {key}=...' in str(error.value)
    (tmp_path / 'b.json').write_text('{}')
    cfg.merge_from_dict({key: 'b.json'})
    check_datasets(cfg, 'train_dataloader', 'val_dataloader')


def test_all_that_is_missing_is_told_at_once(tmp_path):
    def coco(**paths):
        return dict(dataset=dict(type='CocoDataset', **paths))

    load_config(arguments(DIGITS))
    cfg = Config(
        dict(
            train_dataloader=coco(
                data_root=str(tmp_path),
                ann_file='train.json',
                data_prefix=dict(img='train/', seg='never/read'),
            ),
            val_dataloader=coco(data_root='no/coco', ann_file='val.json'),
            val_evaluator=[
                dict(type='CocoMetric', ann_file='no/coco/val.json')
            ],
        )
    )
    with pytest.raises(UsageError) as error:
        check_datasets(cfg, 'train_dataloader', 'val_dataloader')
    _, _, options = str(error.value).partition('--cfg-options ')
    assert options.split() == [
        'train_dataloader.dataset.ann_file=...',
        'train_dataloader.dataset.data_prefix.img=...',
        'val_dataloader.dataset.data_root=...',
        'val_evaluator.0.ann_file=...',
    ]


def test_data_set_by_absolute_paths(tmp_path):
    """Its root is joined to nothing, so it may be anything."""
    load_config(arguments(DIGITS))
    dataset = dict(
        type='CocoDataset',
        data_root='no/coco',
        ann_file=str(tmp_path / 'a.json'),
        data_prefix=dict(img=str(tmp_path)),
    )
    cfg = Config(dict(train_dataloader=dict(dataset=dataset)))
    with pytest.raises(UsageError) as error:
        check_datasets(cfg, 'train_dataloader')
    assert 'no/coco' not in str(error.value)
    (tmp_path / 'a.json').write_text('{}')
    check_datasets(cfg, 'train_dataloader')


def test_data_set_that_downloads_itself():
    """Named as in the zoo: the default scope says of which library."""
    cfg = load_config(
        arguments(
            osp.join(ROOT, 'configs/resnet/resnet18_bcn-ws_1xb2_cifar10.py'),
            cfg_options={
                'train_dataloader.dataset.data_root': 'no/cifar10',
                'val_dataloader.dataset.data_root': 'no/cifar10',
            },
        )
    )
    check_datasets(cfg, 'train_dataloader', 'val_dataloader')
    cfg.train_dataloader.dataset.download = False
    with pytest.raises(UsageError, match="'no/cifar10' for CIFAR10"):
        check_datasets(cfg, 'train_dataloader')


def test_what_cannot_be_checked_is_left_to_the_runner():
    load_config(arguments(DIGITS))
    for dataset in (
        dict(type='CocoDataset', data_root='s3://bucket/coco'),
        dict(type='mmpretrain.CIFAR10', data_root='no/cifar10'),
        dict(
            type='CocoDataset', data_root='no', backend_args={'backend': 'x'}
        ),
        dict(type='CocoDataset', data_prefix=dict(img=''), ann_file=''),
        dict(type='CocoDataset', ann_file='https://host/a.json'),
    ):
        cfg = ConfigDict(train_dataloader=ConfigDict(dataset=dataset))
        check_datasets(cfg, 'train_dataloader')


def test_a_config_without_a_test_set_says_what_to_add():
    cfg = Config(dict(test_dataloader=dict(), val_dataloader=dict()))
    with pytest.raises(UsageError, match='no test_cfg, test_evaluator') as e:
        check_testable(cfg)
    assert 'test_cfg = val_cfg' in str(e.value)
    cfg.test_cfg = cfg.test_evaluator = dict()
    check_testable(cfg)


def test_amp_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(command_line, 'get_device', lambda: 'cpu')
    with pytest.raises(UsageError, match="'cpu'"):
        check_amp()
    monkeypatch.setattr(command_line, 'get_device', lambda: 'cuda')
    check_amp()


class FakeRunner:
    """What the checks before a training look at."""

    def __init__(self, norm_cfg, world_size=1, hooks=(), **cfg):
        self.model = build_norm_layer(norm_cfg, 64)[1]
        self.world_size, self.hooks = world_size, hooks
        settings = dict(
            train_dataloader=dict(batch_size=2),
            optim_wrapper=dict(accumulative_counts=8),
        )
        self.cfg = Config({**settings, **cfg})


def test_rate_for_other_images_is_a_warning(monkeypatch):
    told = []
    monkeypatch.setattr(
        command_line, 'print_log', lambda m, **k: told.append((m, k['level']))
    )
    norm = dict(type='BCN', momentum=0.00125, momentum_annealing=True)
    check_update_rate(FakeRunner(norm))
    check_update_rate(FakeRunner(norm, train_dataloader=dict()))
    assert not told
    check_update_rate(FakeRunner(dict(norm, momentum=0.000625)))
    check_update_rate(
        FakeRunner(
            norm, optim_wrapper={}, hooks=[SyncEstimatesHook()], world_size=4
        )
    )
    assert 'images_per_gpu=2, images_per_update=16' in told[0][0]
    assert 'images_per_gpu=8, images_per_update=8' in told[1][0]
    assert {level for _, level in told} == {logging.WARNING}


def test_scaled_learning_rate_and_accumulation():
    def check(base, **kwargs):
        check_scaled_lr(
            FakeRunner(
                dict(type='BCN'),
                auto_scale_lr=dict(base_batch_size=base),
                **kwargs,
            )
        )

    check(2)
    check(16, optim_wrapper={})
    check(16, world_size=8)
    with pytest.raises(UsageError, match='base_batch_size=2') as error:
        check(16)
    assert 'multiply the learning rate by 0.125' in str(error.value)


def test_missing_checkpoint_lists_those_there(tmp_path):
    (tmp_path / 'epoch_3.pth').write_text('')
    with pytest.raises(UsageError, match='epoch_4.*There: .*epoch_3.pth'):
        check_checkpoint(str(tmp_path / 'epoch_4.pth'))
    check_checkpoint(str(tmp_path / 'epoch_3.pth'))
    check_checkpoint('https://host/model.pth')
    check_checkpoint('torchvision://resnet50')


def test_missing_start_of_a_backbone_is_told_before_training(tmp_path):
    path = str(tmp_path / 'backbone.pth')
    cfg = load_config(arguments(DIGITS))
    check_pretrained(cfg)
    cfg.model.backbone.init_cfg = [
        dict(type='Kaiming'),
        dict(type='Pretrained', checkpoint=path),
    ]
    with pytest.raises(UsageError, match='no checkpoint .*backbone.pth'):
        check_pretrained(cfg)
    (tmp_path / 'backbone.pth').touch()
    check_pretrained(cfg)


def test_usage_errors_are_one_message(capsys):
    def main():
        raise UsageError('what to do')

    with pytest.raises(SystemExit, match='error: what to do'):
        command_line.run(main)


@pytest.mark.parametrize(
    'script', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test']
)
def test_scripts_say_how_they_are_called(script):
    done = subprocess.run(
        ['bash', osp.join(ROOT, f'tools/{script}.sh')],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert 'usage: bash' in done.stderr


def called(tmp_path, script, arguments, **environment):
    """The command line that a script runs, taken by a stand-in for it."""
    for name in ('python', 'srun'):
        fake = tmp_path / name
        fake.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
        fake.chmod(0o755)
    path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(
        ['bash', osp.join(ROOT, f'tools/{script}.sh'), *arguments],
        env={'PATH': path, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_several_machines(tmp_path):
    command = called(
        tmp_path,
        'dist_train',
        ['config.py', '4', '--cfg-options', 'a=[1, 2]'],
        NNODES='2',
        NODE_RANK='1',
        MASTER_ADDR='10.0.0.1',
        PORT='1234',
    )
    for part in (
        '--nnodes=2',
        '--node_rank=1',
        '--master_addr=10.0.0.1',
        '--master_port=1234',
        '--nproc_per_node=4',
        'a=[1, 2]',
    ):
        assert part in command
    assert command[-5:-2] == ['config.py', '--launcher', 'pytorch']


def test_slurm_job(tmp_path):
    command = called(
        tmp_path,
        'slurm_test',
        ['gpu', 'job', 'config.py', 'model.pth', '--tta'],
        GPUS='4',
        SRUN_ARGS='--time 1:00',
    )
    assert command[0].endswith('srun')
    for part in ('--ntasks=4', '--gres=gpu:4', '--time', '1:00'):
        assert part in command
    assert command[-4:] == [
        'config.py',
        'model.pth',
        '--launcher=slurm',
        '--tta',
    ]
