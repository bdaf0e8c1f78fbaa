"""What the tools say when something is missing, and what they build."""

import argparse
import os
import os.path as osp
import subprocess
import sys

import pytest
from mmengine.config import Config, ConfigDict

from wsbcn_mm.engine import command_line
from wsbcn_mm.engine.command_line import (
    UsageError,
    check_amp,
    check_checkpoint,
    check_datasets,
    check_testable,
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
    inner = dict(
        type='CocoDataset', data_root=str(tmp_path), ann_file='a.json'
    )
    wrapped = dict(type='RepeatDataset', times=2, dataset=inner)
    both = dict(type='ConcatDataset', datasets=[wrapped])
    cfg = Config(dict(train_dataloader=dict(dataset=both)))
    load_config(arguments(DIGITS))
    with pytest.raises(UsageError, match='annotation file.*a.json'):
        check_datasets(cfg, 'train_dataloader')
    (tmp_path / 'a.json').write_text('{}')
    check_datasets(cfg, 'train_dataloader', 'val_dataloader')


def test_what_cannot_be_checked_is_left_to_the_runner():
    load_config(arguments(DIGITS))
    for dataset in (
        dict(type='CocoDataset', data_root='s3://bucket/coco'),
        dict(type='mmpretrain.CIFAR10', data_root='no/cifar10'),
        dict(
            type='CocoDataset', data_root='no', backend_args={'backend': 'x'}
        ),
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


def test_missing_checkpoint_lists_those_there(tmp_path):
    (tmp_path / 'epoch_3.pth').write_text('')
    with pytest.raises(UsageError, match='epoch_4.*There: .*epoch_3.pth'):
        check_checkpoint(str(tmp_path / 'epoch_4.pth'))
    check_checkpoint(str(tmp_path / 'epoch_3.pth'))
    check_checkpoint('https://host/model.pth')
    check_checkpoint('torchvision://resnet50')


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
        env={**os.environ, 'PATH': path, **environment},
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
