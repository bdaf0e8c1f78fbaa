import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from wsbcn_mm import BCN, ConvWS
from wsbcn_mm.consumers import record_consumers

TOOL = Path(__file__).parents[2] / 'tools' / 'analysis_tools' / 'sweep_zoo.py'
spec = importlib.util.spec_from_file_location('sweep_zoo', TOOL)
sweep_zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep_zoo)

CIFAR = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'
WORKS = dict(
    status='works',
    converted=False,
    batch_norms_before=2,
    ours=2,
    standardized=2,
    batch_norms=[],
    frozen=[],
    misplaced={},
    not_finite=[],
    not_standardized=[],
    layer_norms=0,
    group_norms=0,
)


def test_zoo_is_wide_and_its_configs_exist():
    configs = [item['config'] for item in sweep_zoo.read_zoo(sweep_zoo.ZOO)]
    assert len(set(configs)) == len(configs)
    for package, least in (('mmdet', 60), ('mmseg', 25), ('mmpretrain', 20)):
        names = [c for c in configs if c.startswith(f'{package}::')]
        assert len(names) >= least
        module = importlib.import_module(package)
        folder = Path(module.__file__).parent / '.mim' / 'configs'
        missing = [
            n for n in names if not (folder / n.split('::')[1]).exists()
        ]
        assert not missing


def test_zoo_with_families_and_options(tmp_path):
    path = tmp_path / 'zoo.txt'
    path.write_text('# comment\n\n# one\nmmdet::a/b.py\nmmseg::c.py size=64\n')
    assert sweep_zoo.read_zoo(path) == [
        dict(config='mmdet::a/b.py', family='one'),
        dict(config='mmseg::c.py', family='one', size=64),
    ]
    path.write_text('faster_rcnn.py\n')
    with pytest.raises(SystemExit, match='faster_rcnn.py'):
        sweep_zoo.read_zoo(path)


def test_nothing_is_downloaded():
    model = dict(
        pretrained='open-mmlab://resnet50',
        backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='url')),
        heads=[dict(init_cfg=dict(type='Normal'), pretrained='url')],
    )
    sweep_zoo.without_pretrained(model)
    assert model == dict(
        pretrained=None,
        backbone=dict(init_cfg=None),
        heads=[dict(init_cfg=dict(type='Normal'), pretrained=None)],
    )


@pytest.mark.parametrize(
    'change, status',
    [
        ({}, 'works'),
        (dict(batch_norms_before=0), 'no BN'),
        (dict(batch_norms=['bn1']), 'partly'),
        (dict(converted=True), 'converted'),
        (dict(converted=True, batch_norms=['a']), 'partly'),
        (dict(frozen=['bcn1']), 'partly'),
        (dict(misplaced={'conv': 'add'}), 'WS misplaced'),
        (dict(not_finite=['loss']), 'not finite'),
        (dict(error='ValueError: a'), 'fails'),
        (dict(error='a', error_before='b'), 'fails as before'),
    ],
)
def test_status(change, status):
    assert sweep_zoo.judge({**WORKS, **change}) == status


def test_table(monkeypatch):
    configs = [
        dict(config='mmdet::a/x.py', family='mmdet: one'),
        dict(config='mmseg::b/y.py', family='mmseg: two'),
        dict(config='mmseg::b/not_run.py', family='mmseg: two'),
    ]
    results = {
        'mmdet::a/x.py': WORKS,
        'mmseg::b/y.py': dict(
            WORKS,
            status='WS misplaced',
            misplaced={'neck.0.conv': 'add', 'neck.1.conv': 'add'},
            layer_norms=3,
        ),
    }
    text = sweep_zoo.table(configs, results)
    assert '| works | 1 |' in text and f'torch {torch.__version__}' in text
    assert '| a/x.py | works | 2 | 2 | 2 |  |' in text
    assert (
        '| b/y.py | WS misplaced | 2 | 2 | 2 | WS before `neck.*.conv (add)`; '
        '3 LayerNorm stay |'
    ) in text
    assert 'not_run' not in text


def test_what_it_looks_for_in_a_step():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.good = ConvWS(3, 8, 3)
            self.norm = BCN(8)
            self.plain = nn.Conv2d(8, 8, 1)
            self.norm2 = BCN(8)
            self.bad = ConvWS(8, 2, 1)
            self.bn = nn.BatchNorm2d(2)

        def forward(self, x):
            x = self.norm2(self.plain(self.norm(self.good(x))))
            return self.bn(self.bad(x).sigmoid())

    net = Net()
    with record_consumers(net) as consumers:
        net(torch.randn(1, 3, 8, 8))
    assert sweep_zoo.misplaced(net, consumers) == {'bad': 'sigmoid'}
    assert sweep_zoo.not_standardized(net, consumers) == ['plain']
    found = sweep_zoo.normalizations(net)
    assert found['batch_norms'] == ['bn'] and found['ours'] == 2
    assert found['standardized'] == 2


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_sweep_is_isolated_and_goes_on(tmp_path):
    """A config that does not exist fails alone; results are kept."""
    zoo = tmp_path / 'zoo.txt'
    zoo.write_text(
        f'# small\n{CIFAR} size=32\nmmpretrain::resnet/no_such_config.py\n'
    )
    results, table = tmp_path / 'zoo.json', tmp_path / 'ZOO.md'
    arguments = [results, '--zoo', zoo, '--table', table]
    done = run(*arguments)
    assert done.returncode == 1, done.stderr
    found = json.loads(results.read_text())
    assert found[CIFAR]['status'] == 'works'
    assert found[CIFAR]['ours'] == found[CIFAR]['standardized'] == 20
    assert 'FileNotFoundError' in table.read_text()
    assert 'kept' not in done.stdout

    done = run(*arguments, '--only', 'cifar10')
    assert done.returncode == 0 and 'kept: works' in done.stdout


@pytest.mark.slow
def test_sweep_ends_what_takes_too_long(tmp_path):
    zoo = tmp_path / 'zoo.txt'
    zoo.write_text(f'{CIFAR} size=32\n')
    results = tmp_path / 'zoo.json'
    assert run(results, '--zoo', zoo, '--timeout', '0.01').returncode == 1
    assert 'no result after' in json.loads(results.read_text())[CIFAR]['error']


def test_wrong_choice_of_configs(tmp_path):
    with pytest.raises(SystemExit, match='no config'):
        sweep_zoo.main([str(tmp_path / 'zoo.json'), '--only', 'no_such'])
