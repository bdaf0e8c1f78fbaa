"""Normalizers compared on any config, with the user's own data."""

import importlib.util
import json
import os
import os.path as osp
import signal
import subprocess
import sys
import threading
import time
from fnmatch import fnmatch
from glob import glob

import pytest
from mmengine.config import Config

ROOT = osp.join(osp.dirname(osp.abspath(__file__)), '..', '..')
CONFIGS = osp.join(ROOT, 'configs')
DIGITS = osp.join(
    CONFIGS, 'digits', 'mask-rcnn_r18-slim_fpn_bn_1xb1-5e_digits.py'
)


def load_tool(name):
    path = osp.join(ROOT, 'tools', f'{name}.py')
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare = load_tool('compare')

from study import trainings  # noqa: E402
from study.comparison import (  # noqa: E402
    PUBLISHED,
    CellStore,
    Comparison,
    Method,
    check_method,
    checkpoint_of,
    published,
)
from study.schedules import (  # noqa: E402
    images_of_schedule,
    set_images,
    shorten,
)

from wsbcn_mm.engine.command_line import UsageError  # noqa: E402


def read(config, *arguments):
    return compare.read_config(compare.parse_args([config, *arguments]))


# --- schedules ------------------------------------------------------------


def counts(cfg):
    """Images, and whatever counts iterations."""
    loop, checkpoint = cfg.train_cfg, cfg.default_hooks.checkpoint
    schedulers = cfg.param_scheduler
    if isinstance(schedulers, dict):
        schedulers = [schedulers]
    return dict(
        images=cfg.train_dataloader.batch_size,
        passes=cfg.optim_wrapper.accumulative_counts,
        base=cfg.auto_scale_lr.base_batch_size,
        ends=[
            scheduler.end
            for scheduler in schedulers
            if not scheduler.get('by_epoch', True)
        ],
        iters=loop.get('max_iters'),
        val_interval=loop.val_interval,
        checkpoints=checkpoint.interval,
    )


@pytest.mark.parametrize(
    'zoo, ours, images',
    [
        (
            'mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py',
            'mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_1xb2-2x_coco.py',
            2,
        ),
        (
            'mmseg::deeplabv3plus/'
            'deeplabv3plus_r50b-d8_4xb2-80k_cityscapes-512x1024.py',
            'deeplabv3plus/'
            'deeplabv3plus_r50b-d8_bcn-ws_1xb1-640k_cityscapes-512x1024.py',
            1,
        ),
        (
            'mmpretrain::resnet/resnet50_8xb32_in1k.py',
            'resnet/resnet50_bcn-ws_1xb2_in1k.py',
            2,
        ),
    ],
)
def test_a_zoo_schedule_becomes_what_we_wrote_by_hand(zoo, ours, images):
    pytest.importorskip(zoo.partition('::')[0])
    comparison = Comparison(
        read(zoo),
        osp.basename(zoo),
        [Method('bcn-ws', 'bcn-ws')],
        images_per_gpu=images,
    )
    (cell, *_) = comparison.final_cells()
    by_hand = Config.fromfile(osp.join(CONFIGS, ours))
    assert counts(comparison.config(cell)) == counts(by_hand)


ITERS = """
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=100)
param_scheduler = [
    dict(type='LinearLR', begin=0, end=50, by_epoch=False),
    dict(type='MultiStepLR', milestones=[600, 900], by_epoch=False),
    dict(type='ExponentialLR', gamma=0.5, by_epoch=False),
]
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=30)
)
custom_hooks = [dict(type='EMAHook', momentum=0.001, begin_iter=10)]
auto_scale_lr = dict(base_batch_size=8)
"""
EPOCHS = """
train_dataloader = dict(batch_size=2, sampler=dict(type='DefaultSampler'))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
train_cfg = dict(by_epoch=True, max_epochs=12, val_interval=1)
param_scheduler = [
    dict(type='LinearLR', begin=0, end=500, by_epoch=False),
    dict(type='MultiStepLR', begin=0, end=12, milestones=[8, 11]),
]
"""


def test_counts_of_iterations_follow_the_batch_size():
    cfg = Config.fromstring(ITERS, '.py')
    set_images(cfg, 1, 16, 2, schedule_images=8)
    assert cfg.train_dataloader.batch_size == 1
    assert cfg.optim_wrapper.accumulative_counts == 8
    assert cfg.train_cfg.max_iters == 4000  # of 2 images instead of 8
    assert cfg.train_cfg.val_interval == 400
    warm_up, steps, decay = cfg.param_scheduler
    assert (warm_up.begin, warm_up.end) == (0, 200)
    assert steps.milestones == [2400, 3600]
    assert decay.gamma**4 == pytest.approx(0.5)
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(0.2)
    # 120 would be, but for the passes of a step, which stay together.
    assert cfg.default_hooks.checkpoint.interval == 120
    (average,) = cfg.custom_hooks
    assert (average.begin_iter, average.momentum) == (40, 0.00025)
    again = Config.fromstring(ITERS, '.py')
    set_images(again, 8, 8, 1, schedule_images=8)
    assert again.train_cfg.max_iters == 1000


def test_a_step_is_a_whole_number_of_passes():
    cfg = Config.fromstring(ITERS, '.py')
    with pytest.raises(UsageError, match='16 images .* 3 per GPU'):
        set_images(cfg, 3, 16, 1, schedule_images=8)
    with pytest.raises(UsageError, match='no multiple'):
        set_images(cfg, 8, 4, 1, schedule_images=8)


def test_images_of_a_schedule_come_from_its_name_first():
    cfg = Config.fromstring(ITERS, '.py')
    assert images_of_schedule(cfg, 'a_4xb2-80k_b.py') == 8
    assert images_of_schedule(cfg, 'rtmdet_8xb32-300e.py') == 256
    assert images_of_schedule(cfg, 'mine.py') == 8
    cfg.optim_wrapper.accumulative_counts = 4
    assert images_of_schedule(cfg, 'a_1xb2.py') == 8
    cfg.auto_scale_lr = None
    assert images_of_schedule(cfg, 'mine.py') is None


def test_a_short_training_keeps_its_proportions():
    cfg = Config.fromstring(ITERS, '.py')
    cfg.optim_wrapper.accumulative_counts = 4
    shorten(cfg, 50)  # 200 iterations of 1000
    assert cfg.train_cfg.max_iters == cfg.train_cfg.val_interval == 200
    assert cfg.param_scheduler[0].end == 10
    assert cfg.param_scheduler[1].milestones == [120, 180]
    cfg = Config.fromstring(EPOCHS, '.py')
    shorten(cfg, 600)
    warm_up, steps = cfg.param_scheduler
    assert steps == dict(
        type='MultiStepLR',
        begin=0,
        end=600,
        milestones=[400, 550],
        by_epoch=False,
    )
    assert warm_up.end == 60  # a tenth
    assert cfg.train_cfg.max_iters == 600
    assert cfg.default_hooks.checkpoint.interval == 150
    assert cfg.train_dataloader.sampler.type == 'InfiniteSampler'


# --- methods --------------------------------------------------------------


@pytest.mark.parametrize(
    'name, spelled',
    [
        ('BCN+WS', 'bcn-ws'),
        ('bn_frozen', 'bn-frozen'),
        ('sync-bcn', 'sync-bcn'),
        ('bcn-large-ws', 'bcn-large-ws'),
        ('mabn-cenconv', 'mabn-cenconv'),
    ],
)
def test_methods_are_named_as_users_name_them(name, spelled):
    assert check_method(name) == spelled


@pytest.mark.parametrize('name', ['bcnws', 'ws', 'bn-frozen-ws', 'gnn-ws'])
def test_an_unknown_method_is_told_its_neighbours(name):
    with pytest.raises(UsageError, match=f'{name!r}.*There are as-is'):
        check_method(name)


def digits(methods, **kwargs):
    pytest.importorskip('mmdet')
    return Comparison(
        read(DIGITS), osp.basename(DIGITS), methods, num_groups=4, **kwargs
    )


def test_a_method_of_ones_own():
    settings = {
        'norm_cfg.momentum': 1e-4,
        'optim_wrapper.clip_grad.max_norm': 1,
        'pretrained': 'torchvision://resnet18',
    }
    comparison = digits([Method('mine', 'bcn-ws', settings)])
    cfg = comparison.configs['mine']
    assert cfg.model.neck.norm_cfg.momentum == 1e-4
    assert cfg.model.neck.norm_cfg.type == 'BCN'
    assert cfg.model.neck.conv_cfg.type == 'ConvWS'
    assert cfg.optim_wrapper.clip_grad.max_norm == 1
    assert cfg.model.backbone.init_cfg.checkpoint == 'torchvision://resnet18'
    other = {'norm_cfg.type': 'GN', 'norm_cfg.num_groups': 2}
    comparison = digits([Method('gn2', 'bcn-ws', other)])
    norm_cfg = comparison.configs['gn2'].model.neck.norm_cfg
    assert norm_cfg == dict(type='GN', num_groups=2)


def test_methods_that_cannot_be_are_rows_with_their_errors():
    comparison = digits(
        [
            Method('bn-frozen', 'bn-frozen'),
            Method('typo', 'bcn', {'norm_cfg.num_group': 4}),
            Method('gn', 'gn'),
        ]
    )
    assert list(comparison.configs) == ['gn']
    assert 'starts from no checkpoint' in comparison.errors['bn-frozen']
    assert "Did you mean 'num_groups'" in comparison.errors['typo']
    text = compare.table(comparison, [], ['segm_mAP'], 'gn')
    assert '| bn-frozen | fails |' in text
    assert '- typo: ValueError' in text


def test_frozen_bn_keeps_the_config_but_for_norm_eval():
    pytest.importorskip('mmdet')
    cfg = read('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    cfg.model.backbone.norm_eval = False
    (method,) = methods = [Method('bn-frozen', 'bn-frozen')]
    frozen = Comparison(cfg, 'a.py', methods).configs[method.name]
    assert frozen.model.backbone.norm_eval is True
    assert frozen.model.backbone.frozen_stages == 1
    ours = read(
        osp.join(
            CONFIGS, 'mask_rcnn/mask-rcnn_r50_fpn_bcn-ws-all_1xb1-1x_coco.py'
        )
    )
    comparison = Comparison(
        ours,
        'a.py',
        [method, *(Method(n, n) for n in ('gn', 'gn-ws', 'bcn', 'bcn-wn'))],
    )
    assert 'no BN to freeze' in comparison.errors['bn-frozen']
    # Each from a checkpoint that fits, whatever the config's was.
    starts = {
        name: checkpoint_of(config.model)
        for name, config in comparison.configs.items()
    }
    assert starts == {
        'gn': 'torchvision://resnet50',
        'gn-ws': 'open-mmlab://jhu/resnet50_gn_ws',
        'bcn': 'torchvision://resnet50',
        'bcn-wn': None,
    }
    ours.model.backbone.init_cfg.checkpoint = 'of_mine_with_ws.pth'
    methods = [Method(n, n) for n in ('gn-ws', 'gn')]
    configs = Comparison(ours, 'a.py', methods).configs
    mine = checkpoint_of(configs['gn-ws'].model)
    assert mine == 'of_mine_with_ws.pth'
    assert checkpoint_of(configs['gn'].model) is None


def test_each_learning_rate_is_a_row():
    comparison = digits([Method('gn', 'gn')], lrs=[0.1, 0.2], seeds=1)
    rates = [
        comparison.config(cell).optim_wrapper.optimizer.lr
        for cell in comparison.final_cells()
    ]
    assert rates == [0.1, 0.2]
    runs = [
        dict(settings=cell, result=dict(bbox_mAP=100 * cell['lr']))
        for cell in comparison.final_cells()
    ]
    text = compare.table(comparison, runs, ['bbox_mAP'], 'gn')
    assert '| gn, lr 0.1 | 10.00 |' in text
    assert '| gn, lr 0.2 | 20.00 |' in text


def test_a_change_of_the_config_is_another_cell():
    methods = [Method('gn', 'gn')]
    short = digits(methods, steps=10).final_cells()
    longer = digits(methods, steps=20).final_cells()
    assert short == digits(methods, steps=10).final_cells()
    assert {c['config'] for c in short}.isdisjoint(c['config'] for c in longer)


# --- processes ------------------------------------------------------------

TRAIN = """
import os, sys, time
config = sys.argv[1]
work_dir = sys.argv[sys.argv.index('--work-dir') + 1]
with open(config) as f:
    text = f.read()
if 'MABN' in text:
    raise ValueError('no MABN today')
checkpoint = os.path.join(work_dir, 'iter_1.pth')
open(checkpoint, 'w').close()
with open(os.path.join(work_dir, 'last_checkpoint'), 'w') as f:
    f.write(checkpoint)
print('Iter(train) [1/2]  eta: 1 day, 2:00:00  time: 1', flush=True)
if os.path.exists('wait') and '--resume' not in sys.argv:
    time.sleep(300)
"""
TEST = """
import json, os, re, sys
with open(sys.argv[1]) as f:
    text = f.read()
(seed,) = re.findall(r'seed=([0-9]+)', text)
folder = os.path.join(sys.argv[sys.argv.index('--work-dir') + 1], 'now')
os.makedirs(folder)
metrics = {'coco/bbox_mAP': 0.1 + 0.01 * int(seed) + 0.2 * ('BCN' in text)}
with open(os.path.join(folder, 'now.json'), 'w') as f:
    json.dump(dict(metrics, time=3.0), f)
"""


@pytest.fixture
def fake_tools(tmp_path, monkeypatch):
    """Tools that train nothing, in processes that are real."""
    folder = tmp_path / 'tools'
    folder.mkdir()
    (folder / 'train.py').write_text(TRAIN)
    (folder / 'test.py').write_text(TEST)
    monkeypatch.setattr(trainings, 'TOOLS', str(folder))
    monkeypatch.chdir(tmp_path)


def coco(folder, images=2, **annotation):
    """A folder with a few images and objects in COCO's format."""
    folder.mkdir(exist_ok=True)
    names = [f'{i}.png' for i in range(images)]
    for name in names:
        (folder / name).write_bytes(b'')
    box = dict(bbox=[0, 0, 4, 4], area=16, category_id=5, iscrowd=0)
    polygon = [[0, 0, 4, 0, 4, 4]]
    content = dict(
        images=[
            dict(id=i, file_name=name, width=8, height=8)
            for i, name in enumerate(names)
        ],
        annotations=[
            dict(
                {**box, 'segmentation': polygon, **annotation},
                id=i,
                image_id=i,
            )
            for i in range(images)
        ],
        categories=[dict(id=5, name='nut'), dict(id=7, name='bolt')],
    )
    (folder / 'labels.json').write_text(json.dumps(content))
    return [str(folder / 'labels.json'), str(folder)]


@pytest.fixture
def data(tmp_path):
    pytest.importorskip('mmdet')
    train, val = coco(tmp_path / 'train'), coco(tmp_path / 'val')
    return ['--train', *train, '--val', *val]


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['compare.py', *map(str, arguments)])
    compare.run(compare.main)


def arguments_for(data, *methods):
    return [
        DIGITS,
        *data,
        *('--methods', *methods),
        *('--num-groups', 4, '--seeds', 2, '--work-dir', 'out'),
    ]


def test_a_comparison_becomes_a_table(data, fake_tools, monkeypatch, capsys):
    arguments = arguments_for(data, 'gn-ws', 'bcn-ws', 'mabn')
    called(monkeypatch, *arguments)
    shown = capsys.readouterr().out
    assert '6 to run, 1 at once' in shown
    text = open('out/compare.md').read()
    # Student's t(0.975, 1) = 12.706; Welch's with two and two is 4.303.
    assert '| gn-ws | 10.50 ± 6.35 |  | 2 of 2 | scratch |' in text
    assert '| bcn-ws | 30.50 ± 6.35 | **+20.00 ± 3.04** | 2 of 2 |' in text
    assert '| mabn | fails |' in text
    assert text in shown
    assert '- mabn: ValueError: no MABN today (method=mabn,seed=0' in text
    assert text.count('no MABN today') == 1  # of both seeds
    assert osp.getsize('out/compare.png') > 1000
    with open('out/compare.json') as f:
        assert len(json.load(f)['runs']) == 6
    folders = glob('out/method=*')
    assert len(folders) == 6
    for folder in folders:
        cfg = Config.fromfile(osp.join(folder, 'config.py'))
        assert cfg.train_dataloader.dataset.metainfo.classes == (
            'nut',
            'bolt',
        )
        assert cfg.model.roi_head.mask_head.num_classes == 2
        assert '$ ' in open(osp.join(folder, 'log.txt')).read()
    # Again: nothing to run but what failed, if asked to.
    called(monkeypatch, *arguments)
    assert '6 of 6 trainings are there' in capsys.readouterr().out
    called(monkeypatch, *arguments, '--retry')
    assert '2 to run' in capsys.readouterr().out


def test_a_dry_run_says_what_differs(data, fake_tools, monkeypatch, capsys):
    called(monkeypatch, *arguments_for(data, 'gn-ws', 'bcn-ws'), '--dry-run')
    shown = capsys.readouterr().out
    same = 'backbone, neck, roi_head.bbox_head, roi_head.mask_head'
    assert f"norm_cfg.type: 'GN' -> 'BCN' ({same})" in shown
    assert 'conv_cfg' not in shown.partition('bcn-ws, compared')[2]
    assert shown.count(': to run') == 4
    assert not osp.exists('out')


def stop_once(path):
    """Send this process SIGTERM when a file is there."""

    def wait():
        for _ in range(600):
            if glob(path):
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def test_an_interruption_loses_nothing(data, fake_tools, monkeypatch, capsys):
    open('wait', 'w').close()
    stop_once('out/method=*/last_checkpoint')
    with pytest.raises(SystemExit) as stopped:
        called(monkeypatch, *arguments_for(data, 'gn-ws'))
    assert stopped.value.code == 130
    assert 'The same command goes on' in capsys.readouterr().out
    (folder,) = glob('out/method=*')
    assert not osp.exists(osp.join(folder, 'record.json'))
    # Nothing of it runs on: the lock is free.
    compare.locked('out').close()
    os.remove('wait')
    called(monkeypatch, *arguments_for(data, 'gn-ws'))
    assert '| gn-ws | 10.50' in open('out/compare.md').read()
    calls = open(osp.join(folder, 'log.txt')).read().split('$ ')[1:]
    assert ['--resume' in call for call in calls] == [False, True, False]


def test_two_do_not_train_in_the_same_folder(data, fake_tools, monkeypatch):
    lock = compare.locked('out')
    holder = subprocess.Popen(
        [sys.executable, '-c', 'input()'],
        stdin=subprocess.PIPE,
        pass_fds=[lock.fileno()],
    )
    lock.close()  # as the parent is killed, and its training is not
    try:
        with pytest.raises(SystemExit, match='a training that it left'):
            called(monkeypatch, *arguments_for(data, 'gn-ws'))
    finally:
        holder.communicate(b'\n')
    compare.locked('out').close()


def test_hours_left_come_from_the_log(tmp_path, fake_tools):
    comparison = digits([Method('gn', 'gn')])
    store = CellStore(str(tmp_path / 'out'))
    cells = comparison.final_cells()
    running, waiting, _ = (
        trainings.Training(cell, comparison, store) for cell in cells
    )
    assert trainings._seconds_left([running, waiting], [], 1) is None
    running.started = time.time() - 3600
    os.makedirs(running.folder)
    with open(running.log, 'w') as f:
        f.write('$ train\nIter(train) [9/10] eta: 1 day, 2:00:00 time: 1')
    left = trainings._seconds_left([running, waiting], [], 1)
    assert left / 3600 == pytest.approx(26 + 27, abs=0.01)
    left = trainings._seconds_left([running, waiting], [], 2)
    assert left / 3600 == pytest.approx((26 + 27) / 2, abs=0.01)


TORCHRUN = """$ train.py
OSError: of another attempt
$ train.py
[rank0]: Traceback (most recent call last):
[rank0]:   File "train.py", line 3, in <module>
[rank0]: RuntimeError: CUDA out of memory.
E1127 18:00:00 torch/distributed/elastic/multiprocessing/api.py] failed
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  error_file: <N/A>
"""


@pytest.mark.parametrize(
    'log, code, said',
    [
        (TORCHRUN, 1, 'RuntimeError: CUDA out of memory.'),
        ('$ train.py\nerror: no data\nPut it there', 1, 'error: no data'),
        ('$ train.py\nnothing', 3, 'ended with exit status 3'),
        ('$ train.py\nnothing', -9, 'ended by SIGKILL: out of memory?'),
        ('$ train.py\nnothing', -11, 'ended by SIGSEGV'),
    ],
)
def test_an_error_is_found_in_the_log(tmp_path, log, code, said):
    path = tmp_path / 'log.txt'
    path.write_text(log)
    assert trainings._last_error(str(path), code) == said


def test_trainings_share_the_gpus(monkeypatch):
    slots = trainings.gpu_slots
    assert slots(['0', '1', '2'], 1, None) == ['0', '1', '2']
    assert slots(['0', '1', '2'], 2, None) == ['0,1']
    assert slots(['4', '5'], 1, 3) == ['4', '5', '4']
    assert slots([], 1, None) == [None]
    assert slots([], 2, 2) == [None, None]
    monkeypatch.setattr(trainings.torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,6')
    assert slots(None, 1, None) == ['3', '6']
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    assert slots(None, 1, None) == ['0', '1']


# --- usage ----------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, said',
    [
        ([], 'give --methods'),
        (['--methods', 'gnn'], "no method 'gnn'. Did you mean"),
        (['--methods', 'gn', 'GN'], 'gn: given more than once'),
        (['--methods', 'gn', '--baseline', 'bn'], '--baseline bn is none'),
        (['--methods', 'sync-bcn'], 'give --gpus-per-training 2'),
        (['--method', 'mine', 'norm_cfg'], 'expected key=value'),
        (['--method', 'mine', 'a.b=1'], 'like=METHOD'),
        (
            ['--method', 'mine', 'like=gn', 'optim_wraper.clip_grad=1'],
            'Did you mean optim_wrapper?',
        ),
        (
            [
                *('--lr', '0.1', '--method', 'mine', 'like=gn'),
                'optim_wrapper.optimizer.lr=0.2',
            ],
            'mine has a learning rate of its own',
        ),
        (
            ['--method', 'mine', 'like=gn', 'norm_cg.eps=1'],
            'Did you mean norm_cfg?',
        ),
        (
            ['--methods', 'gn', '--images-per-gpu', '2'],
            '1 images per optimizer step are no multiple of 2',
        ),
        (['--methods', 'gn', '--cfg-options', 'data_root=1'], 'no data set'),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, said, tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, DIGITS, *arguments)
    first, *_ = str(ended.value.code).splitlines()
    assert first.startswith('error: ')
    assert said in str(ended.value.code).replace('annotation file', 'data set')
    assert not glob('work_dirs/compare/*/method=*')


def test_data_that_is_not_complete_is_told(tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    good, bad = coco(tmp_path / 'good'), coco(tmp_path / 'bad')
    arguments = ['--methods', 'gn', '--train', *good, '--val', *bad]

    def told(match):
        with pytest.raises(SystemExit, match=match):
            called(monkeypatch, DIGITS, *arguments)

    os.remove(tmp_path / 'bad' / '1.png')
    told('lacks 1 of the 2 images .* such as 1.png')
    coco(tmp_path / 'bad', segmentation=[])
    told('annotations without a segmentation')
    (tmp_path / 'bad' / 'labels.json').write_text('[]')
    told('no annotation file in the format of COCO')
    os.remove(tmp_path / 'bad' / 'labels.json')
    told('no annotation file')
    with pytest.raises(SystemExit):
        compare.parse_args([DIGITS, '--train', *good])


# --- published figures ----------------------------------------------------


def test_published_figures_are_of_configs_that_exist():
    zoo = [osp.basename(p) for p in glob(f'{CONFIGS}/*/*.py')]
    for library in ('mmdet', 'mmseg', 'mmpretrain'):
        spec = importlib.util.find_spec(library)
        if spec is None:
            pytest.skip(f'{library} is not installed')
        folder = osp.join(osp.dirname(spec.origin), '.mim', 'configs')
        zoo += [osp.basename(p) for p in glob(f'{folder}/*/*.py')]
    stems = [osp.splitext(name)[0] for name in zoo]
    with open(PUBLISHED) as f:
        groups = json.load(f)
    for group in groups:
        for pattern in group['configs']:
            assert any(fnmatch(s, pattern) for s in stems), pattern
        for row in group['rows']:
            assert row['source'] and row['method']


def test_published_figures_are_shown_beside_their_config():
    text = published('mask-rcnn_r50_fpn_2x_coco.py')
    assert '| published | box AP | mask AP | source |' in text
    assert '| GN + WS | 40.6 | 36.6 |' in text
    assert published('mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py') == text
    assert '| 36.5 | 32.7 |' in published(
        'mask-rcnn_r50-scratch_fpn_bcn-ws-all_1xb1-2x_coco.py'
    )
    assert published(osp.basename(DIGITS)) == ''


# --- all of it ------------------------------------------------------------


@pytest.mark.slow
def test_fifty_images_of_ones_own_become_a_table(tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.chdir(tmp_path)
    env = dict(os.environ, PYTHONPATH=ROOT, OMP_NUM_THREADS='1')

    def tool(name, *arguments):
        path = osp.join(ROOT, 'tools', name)
        return subprocess.run(
            [sys.executable, path, *map(str, arguments)],
            env=env,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    tool(
        'dataset_converters/digit_scenes.py',
        *('--out', 'mine', '--num-train', 50, '--num-val', 8),
        *('--image-size', 96),
    )
    command = [
        'compare.py',
        DIGITS,
        *('--methods', 'gn-ws', 'bcn-ws', '--method', 'bn-like-zoo'),
        *('like=as-is', '--num-groups', 4, '--seeds', 1, '--iters', 4),
        *('--train', 'mine/annotations/instances_train.json'),
        'mine/leftImg8bit/train',
        *('--val', 'mine/annotations/instances_val.json'),
        *('mine/leftImg8bit/val', '--work-dir', 'out'),
    ]
    shown = tool(*command)
    text = open('out/compare.md').read()
    for method in ('gn-ws', 'bcn-ws', 'bn-like-zoo'):
        (line,) = (r for r in text.splitlines() if r.startswith(f'| {method}'))
        assert '1 of 1' in line
    assert text in shown
    assert '0 to run' in tool(*command)
