"""micro_batch_model(..., convert=True) in a config file."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wsbcn_mm import BCN, ConvWS, micro_batch_model
from wsbcn_mm.layers.batch_statistics import BatchStatistics

pytest.importorskip('mmpretrain')

CONFIG = """
_base_ = 'mmpretrain::van/van-tiny_8xb128_in1k.py'

from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model, images_per_gpu=2, images_per_update=16, convert=True
)
model.model.head.num_classes = 5
"""


def batch_norms(model: nn.Module) -> list:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and not isinstance(module, BatchStatistics)
    ]


@pytest.fixture
def cfg(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(CONFIG)
    cfg = Config.fromfile(path)
    init_default_scope('mmpretrain')
    return cfg


def test_what_a_class_has_built_in_is_converted(cfg):
    assert cfg.model.type == 'ConvertedModel'
    assert 'backbone' not in cfg.model  # the base's is not merged in
    model = MODELS.build(cfg.model)
    assert type(model).__name__ == 'ImageClassifier'
    assert not batch_norms(model)
    norms = [m for m in model.modules() if isinstance(m, BCN)]
    assert len(norms) == 30
    assert {norm.momentum for norm in norms} == {0.01 * 2 / 16}
    assert sum(isinstance(m, ConvWS) for m in model.modules()) == 4
    assert len(batch_norms(MODELS.build(cfg.model.model))) == 30


def test_without_it_the_message_says_so(cfg):
    with pytest.raises(ValueError, match='convert=True'):
        micro_batch_model(cfg.model.model)


def test_the_data_preprocessor_of_the_config_reaches_the_model(cfg, tmp_path):
    cfg.work_dir = str(tmp_path)
    cfg.data_preprocessor.mean = [1, 2, 3]
    for part in ('train', 'val', 'test'):
        for name in ('dataloader', 'cfg', 'evaluator'):
            cfg.pop(f'{part}_{name}', None)
    for name in ('optim_wrapper', 'param_scheduler', 'auto_scale_lr'):
        cfg.pop(name, None)
    model = Runner.from_cfg(cfg).model
    assert model.data_preprocessor.mean.flatten().tolist() == [1, 2, 3]
    assert not batch_norms(model)
    with torch.no_grad():
        assert len(model.eval()(torch.randn(1, 3, 64, 64))) == 1
