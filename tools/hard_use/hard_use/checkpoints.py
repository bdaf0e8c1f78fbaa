"""Broken, foreign and hostile checkpoints, into all that reads them."""

import http.server
import os
import pickle
import threading
from pathlib import Path

import torch

from .bench import Bench, attack

GROUP = 'Checkpoints'


class Command:
    """Pickles as a command of the shell, as an attacker's file would."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def train_once(bench: Bench) -> tuple:
    """A config and a good checkpoint of it."""
    config = bench.config('train_cfg = dict(max_epochs=1)\n', 'once.py')
    bench.train(config, bench.folder / 'good').succeeds()
    return config, bench.folder / 'good/epoch_1.pth'


def readers(bench: Bench, config: Path, path) -> dict:
    """Everything of ours that reads a checkpoint, as a command line."""
    out = bench.folder / 'out'
    work_dir = ['--work-dir', bench.folder / 'reader']
    pretrained = bench.config(
        'model = dict(backbone=dict(init_cfg=dict('
        f"_delete_=True, type='Pretrained', checkpoint={str(path)!r})))\n",
        'pretrained.py',
    )
    started = ['--cfg-options', f'load_from={path}']
    return {
        'train.py --resume': ['train.py', config, *work_dir, '--resume', path],
        'train.py, load_from': ['train.py', config, *work_dir, *started],
        'train.py, init_cfg': ['train.py', pretrained, *work_dir],
        'test.py': ['test.py', config, path, *work_dir],
        'fold.py': ['deploy/fold.py', config, path, out],
        'backbone.py': ['model_converters/backbone.py', path, out],
        'normalization.py': [
            'model_converters/normalization.py',
            config,
            path,
            out,
        ],
        'publish.py': ['model_converters/publish.py', path, out],
    }


def refused_by_all(bench: Bench, config, path, *parts, but=()) -> None:
    for name, command in readers(bench, config, path).items():
        if name not in but:
            with bench.survives(f'{Path(path).name} into {name}'):
                bench.run(*command).refuses(*parts)


@attack(GROUP, 'truncated, or of zeros, into every tool', slow=True)
def broken(bench: Bench) -> None:
    config, good = train_once(bench)
    content = good.read_bytes()
    for name, size in (('empty', 0), ('half', len(content) // 2)):
        if name == 'empty' and bench.scale == 1:
            continue  # as the one of zeros, in all that reads them
        path = bench.folder / f'{name}.pth'
        path.write_bytes(content[:size])
        refused_by_all(bench, config, path, f'{name}.pth', 'cannot be read')
    path = bench.folder / 'zeros.pth'  # as after a crash of the machine
    path.write_bytes(bytes(len(content)))
    refused_by_all(bench, config, path, 'zeros.pth', 'cannot be read')


@attack(GROUP, 'a pickle that runs code, into every tool', slow=True)
def malicious(bench: Bench) -> None:
    config, good = train_once(bench)
    witness = bench.folder / 'code_ran'
    command = Command(f'touch {witness}')
    checkpoint = torch.load(good, map_location='cpu', weights_only=False)
    path = bench.folder / 'malicious.pth'
    torch.save(
        dict(checkpoint, meta=dict(checkpoint['meta'], a=command)), path
    )
    raw = bench.folder / 'raw.pth'
    raw.write_bytes(pickle.dumps(command))
    for file in (path, raw):
        refused_by_all(bench, config, file, file.name, 'cannot be read')
        with bench.survives(f'{file.name} ran nothing'):
            assert not witness.exists(), 'the code of the file ran'
    with served(bench.folder) as address:
        for name in ('train.py, load_from', 'train.py, init_cfg', 'test.py'):
            url = f'{address}/malicious.pth'
            command = readers(bench, config, url)[name]
            with bench.survives(f'malicious.pth by http into {name}'):
                cache = bench.folder / 'cache'
                run = bench.run(*command, TORCH_HOME=str(cache))
                assert not witness.exists(), 'the code of the file ran'
                run.refuses('malicious.pth', 'cannot be read')


@attack(GROUP, 'of another network, or nothing of the kind', slow=True)
def foreign(bench: Bench) -> None:
    config, good = train_once(bench)
    network = bench.folder / 'network.pth'
    torch.save(
        {'features.0.weight': torch.ones(8, 3, 3, 3), 'a.bias': torch.ones(8)},
        network,
    )
    refused_by_all(
        bench,
        config,
        network,
        r'network.pth|backbone\.',
        but=['publish.py'],  # which takes any weights
    )
    number = bench.folder / 'number.pth'
    torch.save(3, number)
    refused_by_all(bench, config, number, 'number.pth')
    empty = bench.folder / 'no_weights.pth'
    torch.save(dict(state_dict={}, meta={}), empty)
    refused_by_all(bench, config, empty, 'no_weights.pth')
    wider = bench.folder / 'wider.pth'
    state = torch.load(good, map_location='cpu', weights_only=False)
    state['state_dict'] = {
        key: torch.cat([value, value]) if value.dim() else value
        for key, value in state['state_dict'].items()
    }
    torch.save(state, wider)
    refused_by_all(
        bench,
        config,
        wider,
        'wider.pth',
        but=['train.py, init_cfg', 'backbone.py', 'publish.py'],
    )
    alone = bench.folder / 'weights_alone.pth'
    state = torch.load(good, map_location='cpu', weights_only=False)
    torch.save(dict(state_dict=state['state_dict']), alone)
    resume = readers(bench, config, alone)['train.py --resume']
    with bench.survives('weights_alone.pth into train.py --resume'):
        bench.run(*resume).refuses('weights_alone.pth', 'load_from')
    other = bench.config(
        'train_cfg = dict(max_epochs=2)\n'
        "optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', "
        'lr=0.1))\n'
        'model = dict(rpn_head=dict(num_convs=2))\n',
        'other.py',
    )
    with bench.survives(
        'of another head and optimizer into train.py --resume'
    ):
        command = ['--resume', good]
        bench.train(other, bench.folder / 'other', *command).refuses(
            'epoch_1.pth', 'load_from'
        )


@attack(GROUP, 'that is not there, or cannot be downloaded', slow=True)
def missing(bench: Bench) -> None:
    config = bench.config()
    nowhere = dict(
        http_proxy='http://127.0.0.1:9',
        https_proxy='http://127.0.0.1:9',
        TORCH_HOME=str(bench.folder / 'cache'),
        MMENGINE_HOME=str(bench.folder / 'cache'),
    )
    refused_by_all(bench, config, bench.folder / 'gone.pth', 'gone.pth')
    for path in (
        'torchvision://resnet18',
        'open-mmlab://jhu/resnet50_gn_ws',
        'https://host.invalid/model.pth',
        'torchvision://resnet81',
    ):
        commands = readers(bench, config, path)
        for name in ('train.py, init_cfg', 'train.py, load_from', 'test.py'):
            with bench.survives(f'{path} into {name}'):
                bench.run(*commands[name], **nowhere).refuses(
                    path.rpartition('/')[2], lines=3
                )
    with bench.survives('torchvision://resnet18 in micro_batch_model'):
        text = (
            'from wsbcn_mm import micro_batch_model\n'
            'model = micro_batch_model(dict(_base_.model, backbone=dict('
            '_base_.model.backbone, init_cfg=dict(type="Pretrained", '
            'checkpoint="torchvision://resnet18"))), pretrained=True)\n'
        )
        started = bench.config(text, 'micro.py')
        bench.train(started, bench.folder / 'micro', **nowhere).refuses(
            'resnet18', lines=3
        )


class served:
    """Serve a folder over HTTP on this machine, inside."""

    def __init__(self, folder: Path):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=str(folder))

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), Handler
        )

    def __enter__(self) -> str:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.daemon = True
        thread.start()
        return f'http://127.0.0.1:{self._server.server_port}'

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()
