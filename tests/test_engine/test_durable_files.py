import os

import pytest
import torch
from mmengine.fileio import get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from wsbcn_mm.engine.durable_files import DurableBackend, write_durably


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    backend, path = DurableBackend(), tmp_path / 'new' / 'x.pth'
    backend.put(b'old', path)

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space.*x.pth'):
        backend.put(b'new', path)
    assert path.read_bytes() == b'old'
    assert os.listdir(path.parent) == ['x.pth']


def test_what_is_removed_goes_once_the_next_is_written(tmp_path):
    path = str(tmp_path / 'x')
    backend = DurableBackend()
    backend.put(b'1', f'{path}1')
    backend.remove(f'{path}1')
    backend.remove(f'{path}0')  # which is not there
    assert os.listdir(tmp_path) == ['x1']
    DurableBackend().put(b'2', f'{path}2')  # as MMEngine, by another instance
    assert os.listdir(tmp_path) == ['x2']


def test_a_file_that_is_written_again_is_not_removed(tmp_path):
    path = str(tmp_path / 'x')
    backend = DurableBackend()
    backend.put(b'1', path)
    backend.remove(path)
    backend.put(b'2', path)
    backend.put(b'3', f'{path}3')
    assert sorted(os.listdir(tmp_path)) == ['x', 'x3']


def test_configs_may_name_it():
    backend = get_file_backend('x.pth', backend_args=dict(backend='durable'))
    assert type(backend) is DurableBackend


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.layer(torch.stack(inputs)).mean())


def runner(tmp_path, **hook):
    return Runner(
        Model(),
        str(tmp_path),
        train_dataloader=dict(
            dataset=[dict(inputs=torch.ones(1))],
            batch_size=1,
            sampler=dict(type='DefaultSampler'),
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=3),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1, **hook)
        ),
        experiment_name=tmp_path.name,
        default_scope='mmengine',
    )


@pytest.mark.parametrize('durable', [False, True])
def test_a_checkpoint_that_cannot_be_written(tmp_path, durable, monkeypatch):
    """MMEngine's own has removed the only one by then."""
    run = runner(tmp_path, max_keep_ckpts=1)
    if durable:
        write_durably(run)
    save = run.save_checkpoint

    def full_at_third(out_dir, filename, *args, **kwargs):
        if filename == 'epoch_3.pth':
            raise OSError(28, 'No space left on device')
        save(out_dir, filename, *args, **kwargs)

    monkeypatch.setattr(run, 'save_checkpoint', full_at_third)
    with pytest.raises(OSError, match='No space'):
        run.train()
    found = [path.name for path in tmp_path.glob('*.pth')]
    assert found == (['epoch_2.pth'] if durable else [])


def test_as_many_are_kept_as_asked(tmp_path):
    run = runner(tmp_path, max_keep_ckpts=1)
    write_durably(run)
    run.train()
    assert [path.name for path in tmp_path.glob('*.pth*')] == ['epoch_3.pth']


@pytest.mark.parametrize(
    'hook', [dict(out_dir='s3://x'), dict(backend_args=dict(backend='local'))]
)
def test_what_a_config_says_is_followed(tmp_path, hook):
    run = runner(tmp_path, **hook)
    write_durably(run)
    [checkpoint] = [h for h in run.hooks if isinstance(h, CheckpointHook)]
    assert checkpoint.backend_args == hook.get('backend_args')
