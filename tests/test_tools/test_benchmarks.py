"""The small setting of every benchmark, so that they cannot rot."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
import weakref
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / 'tools' / 'benchmarks'


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name, *options):
        importlib.import_module(name).main(
            ['--device', 'cpu', '--small', '--repeats', '1']
            + ['--out', str(tmp_path), *options]
        )
        written = json.loads((tmp_path / f'{name}.json').read_text())
        assert written['environment']['torch'] == torch.__version__
        assert (tmp_path / f'{name}.md').read_text().startswith('| ')
        assert list(tmp_path.glob(f'{name}*.png'))
        return written['results']

    yield run
    for name in ('_harness', '_variants', 'norm_layers', 'conv_ws', 'smoke'):
        sys.modules.pop(name, None)


def test_norm_layers(benchmark):
    results = benchmark(
        'norm_layers', '--dtypes', 'float32', 'bfloat16', '--layouts',
        'contiguous', 'channels_last',
    )  # fmt: skip
    assert len(results) == 12 * 2 * 2 * 2
    by_layer = {
        r['layer']: r
        for r in results
        if r['dtype'] == 'float32' and r['shape'] == [2, 32, 5, 7]
    }
    # Only the input and small tensors are kept, as by GroupNorm.
    size = 2 * 32 * 5 * 7 * 4 / 2**20
    assert by_layer['BCN']['saved_mib'] < 1.5 * size
    assert by_layer['BCN textbook']['saved_mib'] > 1.9 * size
    assert all(r['ms'] > 0 and r['over_floor'] > 0 for r in results)


def test_what_is_measured_before_a_limit_is_kept(
    benchmark, monkeypatch, tmp_path
):
    norm_layers = importlib.import_module('norm_layers')
    measure, calls = norm_layers.measure, []

    def cut_off(*setting):
        calls.append(setting)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(*setting)

    monkeypatch.setattr(norm_layers, 'measure', cut_off)
    with pytest.raises(KeyboardInterrupt):
        benchmark('norm_layers', '--layers', 'GroupNorm', 'BCN')
    kept = json.loads((tmp_path / 'norm_layers.json').read_text())
    assert [r['layer'] for r in kept['results']] == ['GroupNorm', 'BCN']


def test_unknown_layers_are_named(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark('norm_layers', '--layers', 'GroupNorm', 'BCN', 'IN')
    assert "others of ['GroupNorm', " in capsys.readouterr().err


def test_what_is_compared_on_a_gpu_can_be_chosen(monkeypatch):
    pytest.importorskip('triton')
    monkeypatch.syspath_prepend(str(FOLDER))
    norm_layers = importlib.import_module('norm_layers')
    known = {name for name, _, _ in norm_layers.variants('cuda', 64)}
    assert set(norm_layers.CUDA_LAYERS) <= known


def test_what_bcn_is_compared_with_computes_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from wsbcn_mm import BCN

    variants = importlib.import_module('_variants')
    x = torch.randn(2, 64, 5, 7)
    layers = [
        layer(64)
        for layer in (
            BCN,
            variants.TextbookBCN,
            variants.EstimatesThenGroupNorm,
            variants.AuthorsBCN,
        )
    ]
    for _ in range(3):
        expected, *others = (layer(x) for layer in layers)
        for y in others:
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_conv_ws(benchmark):
    results = benchmark('conv_ws', '--calls', '3')
    assert {r['layer'] for r in results} == {
        'Conv2d', 'mmcv ConvWS', 'ConvWS',
    }  # fmt: skip
    for ours, theirs in zip(
        *([r for r in results if r['layer'] == name]
          for name in ('ConvWS', 'mmcv ConvWS'))
    ):  # fmt: skip
        assert ours['saved_mib'] < theirs['saved_mib']


def test_launch_cost(tmp_path):
    """In a process of its own, whose Triton has another driver."""
    pytest.importorskip('triton')
    subprocess.run(
        [
            *(sys.executable, FOLDER / 'launch_cost.py', '--device', 'cpu'),
            *('--small', '--repeats', '3', '--out', tmp_path),
        ],
        check=True,
    )
    written = json.loads((tmp_path / 'launch_cost.json').read_text())
    launches = {r['layer']: r['launches'] for r in written['results']}
    # What the README says.
    assert launches['BCN, small map'] == 3 + 1
    assert launches['BCN, large map'] == 3 + 3
    assert launches['ConvWS'] == launches['Conv2d'] + 1 + 1
    assert (tmp_path / 'launch_cost.png').exists()


def lines(tmp_path):
    return list(map(json.loads, (tmp_path / 'smoke.jsonl').open()))


def test_smoke(tmp_path):
    """In a process of its own, since Triton's interpreter takes all of it."""
    pytest.importorskip('triton')
    subprocess.run(
        [
            *(sys.executable, FOLDER / 'smoke.py', '--device', 'cpu'),
            *('--small', '--out', tmp_path, 'large'),
        ],
        check=True,
        env={**os.environ, 'TRITON_INTERPRET': '1'},
    )
    first, *measured, last = lines(tmp_path)
    assert first['torch'] == torch.__version__
    assert [line['step'] for line in measured] == ['large'] * 2
    assert last['step'] == 'done' and 'FAILED' not in str(measured)


def test_a_failure_stops_no_other_step(benchmark, monkeypatch, tmp_path):
    pytest.importorskip('triton')
    smoke = importlib.import_module('smoke')

    def fault(args, log):
        raise RuntimeError('CUDA error: an illegal memory access')

    def other(args, log):
        raise ValueError('another')

    for name, step in (('check', other), ('repeat', fault)):
        monkeypatch.setitem(smoke.STEPS, name, step)
    with pytest.raises(SystemExit, match='2 of the lines above say FAILED'):
        benchmark('smoke', 'check', 'repeat', 'large')
    failed = [line for line in lines(tmp_path) if 'FAILED' in line]
    assert [line['step'] for line in failed] == ['check', 'repeat']
    # Nothing more would run after a fault.
    assert lines(tmp_path)[-1] == failed[-1]


def test_what_is_saved_is_counted_and_let_go(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    saved_bytes, outputs = importlib.import_module('_harness').saved_bytes, []

    def forward():
        outputs.append(weakref.ref(torch.ones(8, requires_grad=True).exp()))

    assert saved_bytes(forward) == 8 * 4
    assert outputs[0]() is None


def test_the_convolutions_are_those_of_resnet50(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from torchvision.models import resnet50

    count = {}
    for module in resnet50().modules():
        if isinstance(module, torch.nn.Conv2d):
            size = (module.in_channels, module.out_channels)
            conv = (*size, module.kernel_size[0], module.stride[0])
            count[conv] = count.get(conv, 0) + 1
    assert importlib.import_module('conv_ws').resnet50() == count


@pytest.mark.slow
def test_mask_rcnn_step(benchmark):
    ours, group_norm, theirs = benchmark(
        'mask_rcnn_step', '--variants', 'BCN + ConvWS',
        "GN + mmcv's ConvWS", "BCN, authors' form, + mmcv's ConvWS",
    )  # fmt: skip
    assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-2)
    # The input of a normalization and small tensors are all it saves.
    assert ours['saved_mib'] <= group_norm['saved_mib']


@pytest.mark.slow
def test_mask_rcnn_step_with_the_ops_of_torchvision(monkeypatch, benchmark):
    import mmcv.ops  # noqa: F401

    for op in ('nms', 'roi_align'):  # as they were, for other tests
        module = sys.modules[f'mmcv.ops.{op}']
        monkeypatch.setattr(module, 'ext_module', module.ext_module)

    def losses(ops):
        (result,) = benchmark(
            'mask_rcnn_step', '--variants', 'GN + ConvWS', '--ops', ops
        )
        return result['loss']

    assert losses('mmcv') == pytest.approx(losses('torchvision'), rel=1e-5)


def test_a_missing_gpu_is_named(benchmark):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(SystemExit, match='torch sees no GPU'):
        benchmark('conv_ws', '--device', 'cuda')


def drive(*steps, cwd, **environment):
    kept = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    kept.update(PYTHON=sys.executable, DEVICE='cpu', SMALL='1', **environment)
    return subprocess.run(
        ['bash', FOLDER / 'run_all.sh', *steps],
        cwd=cwd,
        env=kept,
        capture_output=True,
        text=True,
    )


def test_a_step_of_the_driver(tmp_path):
    """From anywhere, without an installed package, into one archive."""
    done = drive('conv_ws', 'tune', cwd=tmp_path, OUT='out')
    assert done.returncode == 0, done.stdout
    assert '== conv_ws: exit 0' in done.stdout
    assert '== tune left out: it needs a GPU' in done.stdout
    with tarfile.open(tmp_path / 'out' / 'results.tgz') as tar:
        assert {'conv_ws.json', 'conv_ws.log'} <= set(tar.getnames())


def test_the_driver_says_what_failed_and_what_it_has(tmp_path):
    done = drive('speed', cwd=tmp_path, OUT=str(tmp_path))
    assert done.returncode == 1
    assert 'no step speed; there are smoke mask_rcnn' in done.stdout
