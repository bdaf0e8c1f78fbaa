import copy
import json
import os
import os.path as osp
import subprocess
import sys
import types

import pytest
import torch
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from torch import nn

from wsbcn_mm import BCN
from wsbcn_mm.engine.checkpoint import read_checkpoint
from wsbcn_mm.engine.command_line import UsageError

STUDY = osp.join(osp.dirname(__file__), '..', '..', 'tools', 'study')
sys.path.insert(0, STUDY)

from study import plots, results  # noqa: E402
from study.cells import Grid, Store, cell_name  # noqa: E402
from study.micro_batches import normalize_in_micro_batches  # noqa: E402


def network(norm_cfg, conv_cfg=None):
    torch.manual_seed(0)
    layers = []
    for channels in (3, 8, 8):
        layers += [
            build_conv_layer(conv_cfg, channels, 8, 3, padding=1),
            build_norm_layer(norm_cfg, 8)[1],
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers).double()


NORMS = dict(
    bn=dict(type='BN'),
    gn=dict(type='GN', num_groups=4),
    bcn=dict(type='BCN', num_groups=4, momentum=0.07),
    average=dict(type='BCN', num_groups=4, momentum=None),
    annealed=dict(
        type='BCN', num_groups=4, momentum=0.2, momentum_annealing=True
    ),
    window=dict(type='BCN', num_groups=4, momentum=0.07, grad_averaging=9),
    exponential=dict(
        type='BCN', num_groups=4, momentum=0.07, grad_averaging=0.05
    ),
    large=dict(type='BCN', num_groups=4, estimate=False),
    bgn=dict(type='BGN', num_groups=4),
    mabn=dict(type='MABN', simulated_batch_size=6, warmup_iters=0),
)


@pytest.mark.parametrize('images', [1, 2, 6])
@pytest.mark.parametrize('norm', NORMS)
def test_micro_batches_equal_one_after_another(norm, images):
    norm_cfg = dict(NORMS[norm])
    if norm == 'mabn':
        norm_cfg['batch_size'] = images
    one_by_one = network(norm_cfg, dict(type='ConvWS'))
    at_once = network(norm_cfg, dict(type='ConvWS'))
    normalize_in_micro_batches(at_once, images)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):  # steps: estimates and buffers are carried over
        x = torch.randn(6, 3, 5, 5, generator=generator).double()
        x = 3 * x + 2
        one_by_one.zero_grad(), at_once.zero_grad()
        for part in x.split(images):
            (one_by_one(part) ** 3).sum().backward()
        (at_once(x) ** 3).sum().backward()
    for a, b in zip(at_once.parameters(), one_by_one.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-11)
    for a, b in zip(at_once.buffers(), one_by_one.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    at_once.eval(), one_by_one.eval()
    torch.testing.assert_close(at_once(x), one_by_one(x))


def test_micro_batches_differ_from_a_large_batch():
    small, large = network(NORMS['bn']), network(NORMS['bn'])
    normalize_in_micro_batches(small, 1)
    x = torch.randn(6, 3, 5, 5).double()
    assert (small(x) - large(x)).abs().max() > 0.1


def test_micro_batches_refuse_a_remainder():
    model = network(NORMS['bn'])
    normalize_in_micro_batches(model, 4)
    with pytest.raises(ValueError, match='6 images.*micro-batches of 4'):
        model(torch.randn(6, 3, 5, 5).double())


GRID = """
task = 'fake'
common = dict(steps=1)
blocks = [dict(method=['A', 'B'], images=[1, 2]), dict(method='C', images=2)]
seeds = [0, 1]
tune = dict(lr=[0.1, 0.2, 0.3], seeds=[7], at=dict(images={1: 2}))
report = dict(
    metric='score',
    metric_name='score',
    rows='method',
    columns='images',
    columns_name='images',
    also=dict(other='other'),
)
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / 'small.py'
    path.write_text(GRID)
    return Grid(str(path))


def add_task(monkeypatch, name, run):
    module = types.ModuleType(f'study.tasks.{name}')
    module.run = run
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def fake_task(monkeypatch):
    """Scores best at a rate of 0.2; method C fails where it is reported."""
    ran = []

    def run(settings):
        ran.append(settings)
        if settings['method'] == 'C' and settings['split'] == 'test':
            raise ValueError('C cannot run')
        score = settings['seed'] + 10 * settings['images']
        return dict(score=score - abs(settings['lr'] - 0.2))

    add_task(monkeypatch, 'fake', run)
    return ran


def complete(grid, store):
    from study.runs import run_cell

    def run_all(cells):
        for cell in cells:
            if store.read(cell) is None:
                run_cell(cell, store.folder)

    tuning = grid.tuning_cells()
    run_all(tuning)
    run_all(grid.final_cells(store.records(tuning)))


def test_grid_expands_lists_and_shares_tuning(grid):
    assert len(grid.cells) == 5
    tuning = grid.tuning_cells()
    assert len(tuning) == 3 * 3  # methods, all of them at two images
    assert {cell['images'] for cell in tuning} == {2}
    assert {cell['split'] for cell in tuning} == {'val'}
    assert grid.final_cells({}) == []  # nothing is tuned yet


def test_final_cells_take_the_best_rate_of_validation(
    grid, fake_task, tmp_path
):
    store = Store(str(tmp_path / 'cells'))
    complete(grid, store)
    final = grid.final_cells(store.records(grid.tuning_cells()))
    assert len(final) == 5 * 2 and {cell['lr'] for cell in final} == {0.2}
    assert {cell['split'] for cell in final} == {'test'}
    assert len({cell_name(cell) for cell in final}) == len(final)


TUNED = """
task = 'rated'
blocks = [dict(method='A', groups=dict(best_of=[2, 4]), images=1)]
seeds = [0, 1]
tune = dict(lr=[0.3, 0.1], seeds=[7, 8]{tie})
report = dict(metric='score', rows='method', columns='images')
"""


@pytest.mark.parametrize(
    'tie, lr, groups', [('', 0.3, 2), (', tie=0.5', 0.1, 4)]
)
def test_ties_are_won_by_the_lowest_learning_rate(
    tmp_path, monkeypatch, tie, lr, groups
):
    scores = {(0.3, 2): 9.0, (0.3, 4): 7.0, (0.1, 2): 8.5, (0.1, 4): 8.6}
    add_task(
        monkeypatch,
        'rated',
        lambda cell: dict(score=scores[cell['lr'], cell['groups']]),
    )
    path = tmp_path / 'tuned.py'
    path.write_text(TUNED.format(tie=tie))
    grid, store = Grid(str(path)), Store(str(tmp_path / 'cells'))
    assert grid.tuned == ['groups', 'lr']
    assert len(grid.tuning_cells()) == 2 * 2 * 2
    complete(grid, store)
    final = grid.final_cells(store.records(grid.tuning_cells()))
    assert [(c['lr'], c['groups'], c['seed']) for c in final] == [
        (lr, groups, 0),
        (lr, groups, 1),
    ]
    found = results.collect(grid, store)
    text = results.tuning(found, grid.report, grid)
    assert '| A, groups 4 | 1 | 7.00 | 8.60 |' in text
    assert ('within 0.5 of the best' in text) == bool(tie)


def test_what_is_tuned_needs_seeds(tmp_path):
    path = tmp_path / 'untuned.py'
    path.write_text(TUNED.format(tie='').replace('tune =', 'other ='))
    with pytest.raises(UsageError, match="best groups .* no 'tune'"):
        Grid(str(path))


def test_a_stopped_grid_loses_no_finished_cell(grid, fake_task, tmp_path):
    store = Store(str(tmp_path / 'cells'))
    complete(grid, store)
    total = len(fake_task)
    lost = sorted(os.listdir(store.folder))[3]
    os.remove(osp.join(store.folder, lost))
    # What a killed process leaves is no record.
    with open(osp.join(store.folder, f'{lost}.123.partial'), 'w') as f:
        f.write('{"sett')
    complete(grid, store)
    assert len(fake_task) == total + 1


def test_a_diverged_training_is_kept_as_json(tmp_path, monkeypatch):
    from study.runs import run_cell

    nan, inf = float('nan'), float('inf')
    diverged = dict(loss=[1.0, nan], other=dict(x=inf))
    add_task(monkeypatch, 'diverging', lambda settings: diverged)
    cell = dict(task='diverging', seed=0)
    run_cell(cell, str(tmp_path))
    with open(Store(str(tmp_path)).path(cell)) as f:
        record = json.load(f, parse_constant=pytest.fail)
    assert record['result'] == dict(loss=[1.0, None], other=dict(x=None))


def test_results_keep_what_a_number_depends_on(grid, fake_task, tmp_path):
    store = Store(str(tmp_path / 'cells'))
    complete(grid, store)
    path = str(tmp_path / 'results.json')
    results.save(results.collect(grid, store), path)
    found = results.load(path)
    assert len(found['runs']) == found['wanted'] == 10
    assert len(found['tuning']) == 9
    assert 'torch' in found['environments'][0]['versions']
    for run in found['runs']:
        assert run['seconds'] >= 0 and run['settings']['steps'] == 1
        assert ('result' in run) != ('error' in run)
    # Byte for byte the same when collected again, from the file alone too.
    again = str(tmp_path / 'again.json')
    for folder in (store.folder, str(tmp_path / 'none')):
        results.save(results.collect(grid, Store(folder), found), again)
        with open(path) as a, open(again) as b:
            assert a.read() == b.read()


def test_table_shows_intervals_and_failures(grid, fake_task, tmp_path):
    store = Store(str(tmp_path / 'cells'))
    complete(grid, store)
    found = results.collect(grid, store)
    text = results.table(found, grid.report, 'score')
    # Seeds 0 and 1: 10.5 and t(0.975, 1) * 0.5 = 6.353
    assert '| A | 10.50 ± 6.35 | 20.50 ± 6.35 |' in text
    assert '| C |  | fails |' in text
    assert 'ValueError: C cannot run' in text
    finished = [run for run in found['runs'] if 'result' in run]
    other = dict(found, runs=finished)
    assert results.table(other, grid.report, 'of other methods') == ''
    rates = results.tuning(found, grid.report, grid)
    assert '| C | 2 | 26.90 | 27.00 | 26.90 |' in rates


def test_table_of_each_seed(grid, fake_task, tmp_path):
    store = Store(str(tmp_path / 'cells'))
    complete(grid, store)
    found = results.collect(grid, store)
    spec = dict(grid.report, each_seed=True, digits=1)
    assert '| A | 10.0, 11.0 | 20.0, 21.0 |' in results.table(
        found, spec, 'score'
    )
    plots.plot_scores(found, spec, ['method'], str(tmp_path / 'seeds.png'))
    assert results.summarized(spec) == 'each seed'
    path = tmp_path / 'dots.png'
    plots.plot_seeds(found, spec, ['method'], str(path))  # one that fails too
    assert path.stat().st_size > 5000


def test_plotted_spans():
    summary = results.score(
        [dict(result=dict(m=v)) for v in (1.0, 2.0, 9.0)], 'm'
    )
    assert plots._span(summary, median=True) == [1.0, 2.0, 9.0]
    low, middle, high = plots._span(summary, median=False)
    assert middle == 4.0 and high - middle == pytest.approx(summary.half)
    assert low == pytest.approx(4.0 - summary.half)


def test_table_says_what_is_missing(grid, fake_task, tmp_path):
    store = Store(str(tmp_path / 'cells'))
    complete(grid, store)
    found = results.collect(grid, store)
    found['runs'] = [r for r in found['runs'] if r['settings']['seed'] == 0]
    text = results.table(found, grid.report, 'score')
    assert '| A | 10.00 (1 of 2 runs) | 20.00 (1 of 2 runs) |' in text
    assert '5 of 10 runs' in results.conditions(found)


def test_interval_is_students():
    runs = [dict(result=dict(m=v)) for v in (1.0, 2.0, 3.0)]
    summary = results.score(runs, 'm')
    # t(0.975, 2) = 4.3027, standard error 1 / sqrt(3)
    assert summary.mean == 2
    assert summary.half == pytest.approx(4.302653 / 3**0.5, rel=1e-5)


def test_difference_has_the_interval_of_welch():
    from scipy.stats import ttest_ind

    mean, half = results.difference([5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 6.0])
    expected = ttest_ind([5, 6, 7, 8], [1, 2, 6], equal_var=False)
    low, high = expected.confidence_interval()
    assert mean == 3.5
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert results.difference([1.0, 1.0], [2.0, 2.0]) == (-1.0, 0.0)


def test_differences_say_in_words_who_is_ahead(grid, fake_task, tmp_path):
    store = Store(str(tmp_path / 'cells'))
    complete(grid, store)
    found = results.collect(grid, store)
    a, b = dict(method='A', images=1), dict(method='B', images=2)
    spec = dict(grid.report, compare=[[a, b], [a, dict(a, method='B')]])
    for run in found['runs']:  # 10 apart, seeds within 0.1
        if 'result' in run:
            run['result']['score'] -= 0.9 * run['settings']['seed']
    text = results.differences(found, spec, 'score')
    # Welch's t(0.975, 2) = 4.303 times sqrt(2) * 0.05
    assert (
        '| A, images 1 | B, images 2 | 2, 2 | -10.00 ± 0.30 | lower |'
    ) in text
    assert '| +0.00 ± 0.30 | not told apart |' in text
    assert results.differences(found, grid.report, 'score') == ''
    spec['compare'] = [[a, dict(method='B')]]
    with pytest.raises(ValueError, match='B names more than one cell'):
        results.differences(found, spec, 'score')
    # A method that fails has no mean to compare.
    spec['compare'] = [[a, dict(method='C', images=2)]]
    assert results.differences(found, spec, 'score') == ''


def test_grid_file_errors_name_the_problem(tmp_path):
    with pytest.raises(UsageError, match='no grid file'):
        Grid(str(tmp_path / 'none.py'))
    path = tmp_path / 'empty.py'
    path.write_text('seeds = [0]')
    with pytest.raises(UsageError, match='does not set blocks, report, task'):
        Grid(str(path))


def test_method_errors_list_the_methods():
    from study.methods import method_cfg

    with pytest.raises(
        ValueError, match="'XN\\+WS'.*BN, BN-frozen, IN, GN, BCN"
    ):
        method_cfg('XN+WS', images=1, batch_size=32)


def test_the_update_rate_is_the_packages_unless_given():
    from study.methods import method_cfg

    from wsbcn_mm import update_rate

    counts = dict(images=2, batch_size=32)
    bcn, conv = method_cfg('BCN+WS', **counts)
    assert bcn['momentum'] == update_rate(2, 32) == 0.01 * 2 / 32
    assert bcn['momentum_annealing'] and conv == dict(type='ConvWS')
    assert method_cfg('BCN', update_rate=0.3, **counts)[0]['momentum'] == 0.3


@pytest.mark.parametrize('name', sorted(os.listdir(osp.join(STUDY, 'grids'))))
def test_grids_of_the_study_are_sound(name):
    from study.methods import method_cfg

    grid = Grid(osp.join(STUDY, 'grids', name))
    assert osp.isfile(osp.join(STUDY, 'study', 'tasks', f'{grid.task}.py'))
    names = {cell_name(cell) for cell in grid.cells}
    assert len(names) == len(grid.cells) > 0, 'a cell is there twice'
    for cell in grid.cells:
        method_cfg(
            cell['method'],
            images=cell['images'],
            batch_size=cell['batch_size'],
        )
        if 'config' in cell:
            assert osp.isfile(osp.join(STUDY, '..', '..', cell['config']))
        if grid.tune is None:
            assert 'lr' in cell
    if osp.isdir(osp.join(STUDY, '..', '..', 'resources', 'study')):
        path = osp.join(
            STUDY, '..', '..', 'resources', 'study', f'{grid.name}.json'
        )
        if osp.isfile(path):  # kept results are of this grid
            kept = results.load(path)
            assert kept['wanted'] == len(grid.cells) * len(grid.seeds)


def test_scenes_are_deterministic_and_splits_share_no_digit():
    from study.scenes import SPLITS, scenes, spread

    a, labels = scenes('train', 50, seed=3)
    b, _ = scenes('train', 50, seed=3)
    assert torch.equal(a, b) and a.shape == (50, 3, 16, 16)
    assert set(labels.tolist()) <= set(range(10))
    assert not torch.equal(a, scenes('train', 50, seed=4)[0])
    ends = sorted(SPLITS.values())
    assert all(x[1] <= y[0] for x, y in zip(ends, ends[1:]))
    alike = spread(scenes('train', 500, seed=0, variation=0.0)[0])
    different = spread(scenes('train', 500, seed=0, variation=1.0)[0])
    assert different['level'] > 1.3 * alike['level']
    assert different['contrast'] > 2 * alike['contrast']


def test_weight_standardization_bounds_the_gradient():
    """The gradient to W is the one to the standardized weight, projected.

    With that to the standardized weight, g, and fan-in I:
    sigma^2 |dW|^2 = |g|^2 - <1, g>^2 / I - <W^, g>^2 / (I - 1).
    """
    from torch.nn.functional import conv2d, cross_entropy, group_norm

    from wsbcn_mm.functional import standardize_weight

    x = torch.randn(4, 5, 8, 8).double()
    weight = (2 * torch.randn(6, 5, 3, 3) + 0.3).double().requires_grad_()
    standardized = standardize_weight(weight, eps=0.0)
    y = group_norm(conv2d(x, standardized), 3)
    loss = cross_entropy(y.relu().mean((2, 3)), torch.arange(4))
    to_weight, to_standardized = (
        g.flatten(1) for g in torch.autograd.grad(loss, (weight, standardized))
    )
    fan_in = weight[0].numel()
    s = standardized.detach().flatten(1)
    left = weight.detach().flatten(1).var(1) * to_weight.square().sum(1)
    right = (
        to_standardized.square().sum(1)
        - to_standardized.sum(1).square() / fan_in
        - (s * to_standardized).sum(1).square() / (fan_in - 1)
    )
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-15)
    assert (left < to_standardized.square().sum(1)).all()


SETTINGS = dict(
    method='BCN+WS',
    images=2,
    batch_size=8,
    steps=6,
    warmup=2,
    evaluated=100,
    width=8,
    num_groups=4,
    lr=0.05,
    seed=0,
    split='val',
)


def test_classification_measures_without_disturbing(tmp_path):
    pytest.importorskip('mmpretrain')
    from study.tasks import classification, smoothness

    plain = classification.run(SETTINGS)
    assert 0 <= plain['accuracy'] <= 100 and len(plain['loss']) == 6
    watched = classification.run({**SETTINGS, 'monitor': 2})
    assert [c['step'] for c in watched['curves']] == [0, 2, 4]
    measured = smoothness.run({**SETTINGS, 'every': 3})
    assert [c['step'] for c in measured['curves']] == [0, 3]
    assert measured['lipschitz'] > 0 and measured['loss_range'] > 0
    clipped = classification.run({**SETTINGS, 'clip_grad': 1e-6})
    assert clipped['loss'][0] == plain['loss'][0]  # before the first step
    assert clipped['loss'][-1] != pytest.approx(plain['loss'][-1], rel=0.01)
    for other in (watched, measured):  # to the last digit
        assert other['loss'] == plain['loss']
        assert other['test_loss'] == plain['test_loss']


def test_bn_of_single_images_is_instance_normalization():
    """In training, and in evaluation with each image's own statistics."""
    pytest.importorskip('mmpretrain')
    from study.scenes import scenes
    from study.tasks import classification

    cell = dict(SETTINGS, images=1, split='test', steps=2)
    bn = classification.run(dict(cell, method='BN'))
    instance = classification.run(dict(cell, method='IN'))
    assert bn['loss'] == pytest.approx(instance['loss'], rel=1e-4)
    assert {'accuracy_own', 'accuracy_precise'} <= set(bn)
    assert not {'accuracy_own', 'accuracy_precise'} & set(instance)

    def loss(method, **kwargs):
        torch.manual_seed(0)
        settings = {**classification.DEFAULTS, **cell, 'method': method}
        model = classification.build_model(settings)
        nn.init.normal_(model.head.fc.weight)  # initialized near zero
        normalize_in_micro_batches(model, 1)
        test = scenes('test', 20, seed=0)
        return classification.evaluate(model, *test, **kwargs)['test_loss']

    own = loss('BN', own_statistics=1)
    assert own == pytest.approx(loss('IN'), rel=1e-5)
    assert own != pytest.approx(loss('BN'), rel=1e-2)


def test_a_scheduled_rate_follows_the_learning_rate():
    pytest.importorskip('mmpretrain')
    from study.tasks import classification

    cell = {**SETTINGS, 'update_rate': 0.5, 'scheduled': True}
    rates = []

    def watch(step, model, images, labels):
        rates.append({m.momentum for m in model.modules() if type(m) is BCN})

    classification.run(cell, watch)
    expected = [0.5 * classification.schedule(i, cell) for i in range(6)]
    assert [r for (r,) in rates] == pytest.approx(expected)
    assert expected[0] == 0.25 and expected[1] > 0.45 > 0.1 > expected[5]


TINY = """
task = 'classification'
common = dict({settings})
blocks = [dict(method=['BN', 'BCN+WS'], images=[1, 2])]
seeds = [0]
report = dict(
    metric='accuracy',
    metric_name='accuracy (%)',
    rows='method',
    columns='images',
    columns_name='images',
    error=True,
)
"""


@pytest.mark.slow
def test_commands_run_resume_and_report(tmp_path):
    pytest.importorskip('mmpretrain')
    pytest.importorskip('matplotlib')
    common = {k: SETTINGS[k] for k in SETTINGS if k not in ('split', 'seed')}
    common.pop('method'), common.pop('images')
    path = tmp_path / 'tiny.py'
    path.write_text(
        TINY.format(settings=', '.join(f'{k}={v}' for k, v in common.items()))
    )

    def call(script, *arguments):
        return subprocess.run(
            [sys.executable, osp.join(STUDY, script), str(path), *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    work_dir = f'--work-dir={tmp_path / "work"}'
    assert '4 to run' in call('run.py', work_dir, '--workers=2')
    assert '4 there, 0 to run' in call('run.py', work_dir)
    text = call('report.py', work_dir, f'--out={tmp_path / "out"}')
    assert '| BCN+WS |' in text and '4 of 4 runs' in text
    assert (tmp_path / 'out' / 'tiny.png').stat().st_size > 5000
    found = json.loads((tmp_path / 'out' / 'tiny.json').read_text())
    assert len(found['runs']) == 4
    # From the kept file alone, the same, and nothing to run again.
    other = f'--work-dir={tmp_path / "other"}'
    assert call('report.py', other, f'--out={tmp_path / "out"}') == text
    listed = call('run.py', other, '--list', f'--kept={tmp_path / "out"}')
    assert 'trainings 4 of 4' in listed


MINIATURE = dict(
    task='openmmlab',
    images=1,
    batch_size=2,
    steps=1,
    num_train=4,
    num_val=2,
    image_size=96,
    spread=0.5,
    lr=1e-3,
    seed=0,
    split='test',
)


@pytest.mark.slow
def test_detection_and_segmentation_cells_run(tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    from study.runs import run_cell
    from study.tasks import openmmlab

    monkeypatch.chdir(tmp_path)

    def record(name, method, **settings):
        grid = Grid(osp.join(STUDY, 'grids', f'{name}.py'))
        cell = {**grid.cells[0], **MINIATURE, 'method': method, **settings}
        openmmlab.prepare([cell])
        return run_cell(cell, str(tmp_path / 'cells')), grid.report['metric']

    detection, metric = record('detection', 'BCN+WS')
    assert 'error' not in detection, detection['traceback']
    assert 0 <= detection['result'][metric] <= 1
    for settings in (
        {},
        dict(image_pool='GN', fresh_estimates=True, separable_ws=True),
        dict(head_method='GN'),
    ):
        found, metric = record('segmentation', 'BCN+WS', **settings)
        assert 'error' not in found, found['traceback']
        assert 0 <= found['result'][metric] <= 100
    for method in ('BN-frozen', 'GN+WN'):
        cell = dict(MINIATURE, method=method, pretrained=True)
        openmmlab.prepare([cell])
        grid = Grid(osp.join(STUDY, 'grids', 'detection_pretrained.py'))
        cell = {**openmmlab.DEFAULTS, **grid.cells[0], **cell}
        found = run_cell(cell, str(tmp_path / 'cells'))
        assert 'error' not in found, found['traceback']
        start = read_checkpoint(openmmlab.classifier(cell))
        backbone = start['state_dict']['backbone.conv1.weight']
        cfg = openmmlab.build_config(cell, 'work')
        model = MODELS.build(cfg.model)
        model.init_weights()
        assert torch.equal(model.backbone.conv1.weight, backbone)
        assert model.backbone.norm_eval == (method == 'BN-frozen')
        assert model.with_mask
    # BN cannot run at one image, which is a row of the table.
    failed, _ = record('segmentation', 'BN')
    assert 'Expected more than 1 value per channel' in failed['error']


def untrained_config(cell):
    from study.tasks import openmmlab

    cell = {**openmmlab.DEFAULTS, **cell}
    cell.update(pretrained=False, split='test', seed=0)
    return openmmlab.build_config(cell, 'work')


def untrained_model(cell):
    return untrained_config(cell).model


def test_detection_with_clipped_gradients_and_a_longer_window():
    pytest.importorskip('mmdet')
    grid = Grid(osp.join(STUDY, 'grids', 'detection_sgd_choices.py'))
    (window,) = (c for c in grid.cells if c['method'] == 'MABN+CenConv')
    model = untrained_model({**window, 'lr': 0.02})
    assert model.backbone.norm_cfg.simulated_batch_size == 32
    assert model.backbone.norm_cfg.batch_size == 1
    clipped = {**grid.cells[0], 'lr': 0.02, 'method': 'BN'}
    assert clipped['clip_grad'] == 10
    wrapper = untrained_config(clipped).optim_wrapper
    assert wrapper.clip_grad == dict(max_norm=10)
    assert wrapper.optimizer.type == 'SGD'
    clipped['clip_grad'] = None
    assert 'clip_grad' not in untrained_config(clipped).optim_wrapper


def test_heads_of_another_method():
    pytest.importorskip('mmseg')
    grid = Grid(osp.join(STUDY, 'grids', 'segmentation_long_choices.py'))
    cells = [cell for cell in grid.cells if cell.get('head_method')]
    assert {cell['method'] for cell in cells} == {'BCN+WS', 'GN+WS'}
    for cell in cells:
        model = untrained_model(cell)
        for part, method in (
            (model.backbone, cell['method']),
            (model.decode_head, cell['head_method']),
            (model.auxiliary_head, cell['head_method']),
        ):
            assert part.norm_cfg.type == method.partition('+')[0]
            assert part.conv_cfg.type == 'ConvWS'
            if part.norm_cfg.type == 'BCN':
                assert part.norm_cfg.momentum == cell['update_rate']


def test_separable_convolutions_get_ws():
    pytest.importorskip('mmseg')
    grid = Grid(osp.join(STUDY, 'grids', 'segmentation_separable.py'))

    def plain(cell):
        head = MODELS.build(untrained_model(cell)).decode_head
        return [n for n, m in head.named_modules() if type(m) is nn.Conv2d]

    for cell in ({**cell, 'lr': 1e-3} for cell in grid.cells):
        assert plain(cell) == ['conv_seg']
        # Or the setting has no meaning any more:
        assert len(plain({**cell, 'separable_ws': False})) == 11


@pytest.mark.slow
@pytest.mark.parametrize('method', ['BCN+WS', 'GN+WS'])
def test_a_step_in_one_pass_equals_accumulated_images(
    tmp_path, monkeypatch, method
):
    pytest.importorskip('mmseg')
    from study.tasks import openmmlab

    monkeypatch.chdir(tmp_path)
    grid = Grid(osp.join(STUDY, 'grids', 'segmentation_sgd_rate.py'))
    cell = {**openmmlab.DEFAULTS, **grid.cells[0], **MINIATURE}
    cell.update(method=method, steps=2, pretrained=False, lr=0.05)
    openmmlab.prepare([cell])

    def trained(one_pass):
        work_dir = str(tmp_path / f'one_pass_{one_pass}')
        runner = openmmlab.build_training(
            {**cell, 'one_pass': one_pass}, work_dir
        )
        assert runner.optim_wrapper.optimizer.type == 'SGD'
        assert runner.max_iters == (2 if one_pass else 4)
        runner.param_schedulers = None  # whose iterations are not the same
        start = copy.deepcopy(runner.model.state_dict())
        for module in runner.model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
            if hasattr(module, 'class_weight'):
                module.class_weight = None
        runner.train()
        return start, runner.model.state_dict()

    (start, once), (_, accumulated) = trained(True), trained(False)
    torch.testing.assert_close(once, accumulated, rtol=1e-2, atol=2e-3)
    for name in ('backbone.conv1.weight', 'decode_head.conv_seg.weight'):
        assert (once[name] - start[name]).abs().max() > 1e-2


@pytest.mark.slow
def test_a_scheduled_rate_in_a_segmentation(tmp_path, monkeypatch):
    pytest.importorskip('mmseg')
    from study.tasks import openmmlab

    monkeypatch.chdir(tmp_path)
    grid = Grid(osp.join(STUDY, 'grids', 'segmentation_sgd_rate.py'))
    cell = {**openmmlab.DEFAULTS, **grid.cells[0], **MINIATURE}
    cell.update(steps=6, pretrained=False, update_rate=0.5, scheduled=True)
    openmmlab.prepare([cell])
    runner = openmmlab.build_training(cell, str(tmp_path / 'work'))
    norms = [m for m in runner.model.modules() if isinstance(m, BCN)]
    seen = []

    class Watch(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            (rate,) = {norm.momentum for norm in norms}
            lr = runner.optim_wrapper.param_groups[0]['lr']
            seen.append((rate, 0.5 * lr / cell['lr']))

    runner.register_hook(Watch(), priority='VERY_HIGH')
    runner.train()
    rates, expected = zip(*seen)
    assert rates == pytest.approx(expected)
    assert len(set(expected)) > 3 and max(expected) <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize('sync', ['estimates', 'layers'])
def test_cell_of_two_processes(tmp_path, monkeypatch, sync):
    pytest.importorskip('mmdet')
    from study.runs import run_cell
    from study.tasks import openmmlab

    monkeypatch.chdir(tmp_path)
    grid = Grid(osp.join(STUDY, 'grids', 'detection_processes.py'))
    cell = {**grid.cells[0], **MINIATURE, 'sync': sync, 'batch_size': 2}
    openmmlab.prepare([cell])
    found = run_cell(cell, str(tmp_path / 'cells'))
    assert 'error' not in found, found['traceback']
    assert 0 <= found['result'][grid.report['metric']] <= 1


@pytest.mark.slow
def test_readout_of_random_features(tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    from study.tasks import readout

    monkeypatch.chdir(tmp_path)
    grid = Grid(osp.join(STUDY, 'grids', 'readout.py'))
    cell = {**grid.cells[0], **MINIATURE, 'fitted': 3, 'evaluated': 1}
    readout.prepare([cell])
    found = readout.run(cell)
    assert list(found) == ['stride4', 'stride8', 'stride16', 'stride32']
    # Of its own scenes' pixels, a linear map tells more than chance.
    assert 0.5 < found['stride4'] <= 1
    assert readout.run(cell) == found
    with pytest.raises(ValueError, match='4 images, 9 are needed'):
        readout.run({**cell, 'fitted': 8})
