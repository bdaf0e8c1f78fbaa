import hashlib
import runpy
import sys
from pathlib import Path

import authors
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import get_state_dict

from wsbcn_mm import ConvWS
from wsbcn_mm.layers.checkpoint_names import RECORD

TOOLS = Path(__file__).parents[2] / 'tools' / 'model_converters'

CLASSIFIER = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet',
        depth=18,
        base_channels=8,
        stem_channels=8,
        norm_cfg=dict({norm}),
        conv_cfg=dict(type='ConvWS'),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='CrossEntropyLoss'),
    ),
)
"""


def run(monkeypatch, tool, *arguments):
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
    runpy.run_path(str(TOOLS / tool), run_name='__main__')


def build(tmp_path, norm):
    pytest.importorskip('mmpretrain')
    from wsbcn_mm.engine.checkpoint import read_config

    config = tmp_path / 'config.py'
    config.write_text(CLASSIFIER.format(norm=norm))
    return config, MODELS.build(read_config(str(config)).model)


@pytest.fixture
def classifier(tmp_path):
    """A checkpoint as training leaves it."""
    _, model = build(tmp_path, "type='BCN', num_groups=4")
    path = tmp_path / 'epoch_1.pth'
    torch.save(
        dict(
            state_dict=get_state_dict(model),
            optimizer=dict(state={0: torch.zeros(1000)}),
            message_hub={},
            param_schedulers=[],
            meta=dict(cfg='model = 1', hostname='secret', epoch=1),
        ),
        path,
    )
    return model, path


def written(folder, stem):
    (path,) = folder.glob(f'{stem}-*.pth')
    return path


def test_publish(tmp_path, classifier, monkeypatch, capsys):
    model, path = classifier
    run(monkeypatch, 'publish.py', path, tmp_path / 'out' / 'model.pth')
    new = written(tmp_path / 'out', 'model')
    digest = hashlib.sha256(new.read_bytes()).hexdigest()
    assert new.name == f'model-{digest[:8]}.pth'
    content = torch.load(new)
    assert set(content) == {'state_dict', 'meta'}
    assert content['meta'] == dict(cfg='model = 1', epoch=1)
    assert content['state_dict'].keys() == model.state_dict().keys()
    assert 'message_hub, optimizer, param_schedulers' in (
        capsys.readouterr().out
    )
    assert len(list((tmp_path / 'out').iterdir())) == 1


def test_backbone(tmp_path, classifier, monkeypatch, capsys):
    mmdet = pytest.importorskip('mmdet.models')
    model, path = classifier
    run(monkeypatch, 'backbone.py', path, tmp_path / 'r18.pth')
    assert '2 others were left out' in capsys.readouterr().out
    new = written(tmp_path, 'r18')
    state = torch.load(new)['state_dict']
    assert state._metadata['layer1.0'][RECORD].keys() == {'conv1', 'conv2'}
    backbone = mmdet.ResNet(
        18,
        base_channels=8,
        stem_channels=8,
        norm_cfg=dict(type='BCN', num_groups=4),
        conv_cfg=dict(type='ConvWS'),
        init_cfg=dict(type='Pretrained', checkpoint=str(new)),
    )
    backbone.init_weights()
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, model.state_dict()[f'backbone.{key}'])


def test_backbone_of_something_else(tmp_path, monkeypatch):
    path = tmp_path / 'x.pth'
    torch.save({'encoder.conv.weight': torch.zeros(1)}, path)
    with pytest.raises(SystemExit, match='has encoder. Name .* --prefix'):
        run(monkeypatch, 'backbone.py', path, tmp_path / 'y.pth')
    run(
        *(monkeypatch, 'backbone.py', path, tmp_path / 'y.pth'),
        *('--prefix', 'encoder.'),
    )
    state = torch.load(written(tmp_path, 'y'))['state_dict']
    assert list(state) == ['conv.weight']


def test_normalization(tmp_path, monkeypatch, capsys):
    _, source = build(tmp_path, "type='GN', num_groups=4")
    for p in source.parameters():
        p.data += 0.1 * torch.randn_like(p)
    state = get_state_dict(source)
    state['extra.weight'] = torch.zeros(1)
    torch.save(dict(state_dict=state), tmp_path / 'gn.pth')
    config, target = build(
        tmp_path, "type='BCN', num_groups=4, channel_affine='channel'"
    )
    run(
        *(monkeypatch, 'normalization.py', config),
        *(tmp_path / 'gn.pth', tmp_path / 'bcn.pth'),
    )
    output = capsys.readouterr().out
    assert 'Of no use, so left out: 1\n  extra.weight' in output
    assert 'initialized: 0' in output
    load_checkpoint(target, str(written(tmp_path, 'bcn')), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        a, b = target.eval()(x)[0], source.eval()(x)[0]
    assert torch.allclose(a, b, atol=1e-4)


def test_normalization_of_another_network(tmp_path, monkeypatch):
    config, _ = build(tmp_path, "type='BCN', num_groups=4")
    path = tmp_path / 'x.pth'
    for state, words in (
        ({'conv.weight': torch.zeros(1)}, 'is of another network'),
        ({'backbone.conv1.weight': torch.zeros(1)}, 'is of another network'),
        ({'bn1.pbn.running_mean': torch.zeros(1)}, 'authors.py translates'),
    ):
        torch.save(state, path)
        with pytest.raises(SystemExit, match=words):
            run(
                *(monkeypatch, 'normalization.py', config),
                *(path, tmp_path / 'y.pth'),
            )
    assert not list(tmp_path.glob('y-*'))


@pytest.mark.parametrize(
    'make, library, inside',
    [
        (authors.classifier, 'mmpretrain', True),
        (authors.resnext, 'mmpretrain', True),
        (authors.deeplab, 'mmseg', False),
    ],
)
def test_the_networks_of_the_authors(
    tmp_path, monkeypatch, capsys, messages, make, library, inside
):
    pytest.importorskip(f'{library}.models')
    theirs = make()
    state = {f'module.{k}': v for k, v in theirs.state_dict().items()}
    torch.save(dict(state_dict=state, epoch=90), tmp_path / 'theirs.pth')
    run(
        *(monkeypatch, 'authors.py', tmp_path / 'theirs.pth'),
        tmp_path / 'ours.pth',
    )
    assert f"'eps_inside_sqrt': {inside}" in capsys.readouterr().out
    path = written(tmp_path, 'ours')
    cfg = Config.fromfile(path.with_suffix('.py'))
    assert torch.load(path)['meta']['cfg'] == cfg.pretty_text
    with DefaultScope.overwrite_default_scope(library):
        ours = MODELS.build(cfg.model).double()
    assert not [t for level, t in messages if level == 'WARNING']
    messages.clear()
    load_checkpoint(ours, str(path), strict=True)
    assert not messages
    x = torch.randn(2, 3, 65, 65, dtype=torch.float64)
    with torch.no_grad():
        ours.eval()
        got, wanted = ours(x, mode='tensor'), theirs(x)
        got = got if inside else resize(got, wanted.shape[2:])
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    # The record of the form is in the file.
    for module in ours.modules():
        if isinstance(module, ConvWS):
            module.eps_inside_sqrt = not inside
    load_checkpoint(ours, str(path))
    (text,) = [t for level, t in messages if level == 'WARNING']
    assert f'eps_inside_sqrt={inside}) of its weights' in text
    assert (
        f'with standardize_weight(eps=1e-05, eps_inside_sqrt={not inside})'
        in text
    )


def resize(x, size):
    return torch.nn.functional.interpolate(
        x, size, mode='bilinear', align_corners=True
    )


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda s: s.pop('fc.weight'), 'neither their classifier'),
        (lambda s: s.pop('layer2.0.conv1.weight'), 'layer2.0.conv1'),
        (lambda s: s.update({'layer2.9.x': torch.ones(1)}), r'\(2, 3, 2, 2\)'),
        (
            lambda s: [s.pop(k) for k in list(s) if 'pbn' in k],
            "'pbn.running_mean'.*normalization.py",
        ),
    ],
)
def test_what_is_not_of_the_authors(tmp_path, monkeypatch, change, words):
    pytest.importorskip('mmpretrain.models')
    state = dict(authors.classifier().state_dict())
    change(state)
    torch.save(state, tmp_path / 'theirs.pth')
    with pytest.raises(SystemExit, match=words):
        run(
            *(monkeypatch, 'authors.py', tmp_path / 'theirs.pth'),
            tmp_path / 'ours.pth',
        )
    assert not list(tmp_path.glob('ours*'))


@pytest.mark.parametrize('tool', ['publish.py', 'backbone.py', 'authors.py'])
def test_no_such_file(tmp_path, monkeypatch, tool):
    with pytest.raises(SystemExit, match='no checkpoint'):
        run(monkeypatch, tool, tmp_path / 'none.pth', tmp_path / 'y.pth')
