"""The examples of README and docs run, or at least name what there is."""

import argparse
import re
import runpy
import shlex
import subprocess

import pytest
from markdown_pages import DOCS, NAMES, PAGES, ROOT, blocks
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, DefaultScope

from wsbcn_mm.engine.update_rate import rate_contradiction


def is_config(block):
    return block.startswith('_base_ =')


PYTHON = [p for p in DOCS if not all(map(is_config, blocks(p, 'python')))]
SHELL = [p for p in PAGES if blocks(p, 'shell', 'bash')]
CONFIGS = [
    pytest.param(block, id=f'{NAMES[page]}-{number}')
    for page in DOCS
    for number, block in enumerate(blocks(page, 'python'))
    if is_config(block)
]


def build_hooks(hooks):
    for hook in hooks:
        assert HOOKS.build(dict(hook)) is not None


@pytest.mark.parametrize('page', PYTHON, ids=NAMES.get)
def test_python_examples_run(page, tmp_path, monkeypatch):
    """One after another, as somebody who pastes all of them."""
    monkeypatch.chdir(tmp_path)
    namespace = {'__name__': 'example'}
    for block in blocks(page, 'python'):
        if is_config(block):
            continue
        namespace.pop('custom_hooks', None)
        namespace.pop('norm_cfg', None)
        exec(compile(block, f'{NAMES[page]}:\n{block}', 'exec'), namespace)
        build_hooks(namespace.get('custom_hooks', ()))
        if 'norm_cfg' in namespace:
            settings = dict(namespace['norm_cfg'])
            MODELS.get(settings.pop('type'))(64, **settings)


def counts_of_iterations(cfg):
    """Whatever a schedule counts in iterations."""
    for number, scheduler in enumerate(cfg.param_scheduler):
        if not scheduler.get('by_epoch', True):
            yield f'param_scheduler[{number}].end', scheduler.end
    if not cfg.train_cfg.get('by_epoch', 'max_epochs' in cfg.train_cfg):
        yield 'max_iters', cfg.train_cfg.max_iters
        yield 'val_interval', cfg.train_cfg.val_interval
    checkpoint = cfg.default_hooks.checkpoint
    if not checkpoint.get('by_epoch', True):
        yield 'checkpoint.interval', checkpoint.interval


def optimizer_steps(cfg):
    passes = cfg.optim_wrapper.get('accumulative_counts', 1)
    return {name: n / passes for name, n in counts_of_iterations(cfg)}


@pytest.mark.filterwarnings('ignore:micro_batch_model')
@pytest.mark.parametrize('block', CONFIGS)
def test_configs_are_right_as_they_stand(block, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(block)
    cfg = Config.fromfile(str(path))
    (tmp_path / 'base.py').write_text(block.splitlines()[0])
    base = Config.fromfile(str(tmp_path / 'base.py'))
    assert optimizer_steps(cfg) == optimizer_steps(base)

    build_hooks(cfg.get('custom_hooks', ()))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    if 'accumulative_counts' in block:
        passes = cfg.optim_wrapper.accumulative_counts
        batch_size = cfg.train_dataloader.batch_size
        assert rate_contradiction(model, batch_size, passes) is None


def commands(block):
    """The commands of a shell block, each as a list of words."""
    block = block.replace('\\\n', ' ')
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, w in enumerate(words) if w == '&&'), None)
            command = words if end is None else words[:end]
            words = [] if end is None else words[end + 1 :]
            while command and re.match(r'[A-Z_]+=', command[0]):
                command = command[1:]
            if command:
                yield command


class Parsed(Exception):
    """The arguments of a tool were accepted."""


def check_python(arguments, monkeypatch):
    if arguments[0] == '-c':
        exec(arguments[1], {})
        return
    script = ROOT / arguments[0]
    assert script.is_file(), script
    if not re.search('ArgumentParser|options.parse_args', script.read_text()):
        return  # no options to check
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
        patch.setattr('sys.argv', [str(script), *arguments[1:]])
        patch.syspath_prepend(str(script.parent))
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name='__main__')


def check_bash(arguments):
    script = ROOT / arguments[0]
    assert script.is_file(), script
    subprocess.run(['bash', '-n', script], check=True)


def check_pip(arguments):
    if arguments[0] not in ('install', 'download'):
        raise AssertionError(f'pip {arguments}')
    text = (ROOT / 'pyproject.toml').read_text()
    for argument in arguments:
        for extra in re.findall(r'^\.\[(.*)\]$', argument):
            for name in extra.split(','):
                assert re.search(f'^{name} = \\[', text, re.MULTILINE), name


@pytest.mark.parametrize('page', SHELL, ids=NAMES.get)
def test_shell_examples_name_what_there_is(page, monkeypatch):
    for block in blocks(page, 'shell', 'bash'):
        for program, *arguments in commands(block):
            if program == 'python':
                check_python(arguments, monkeypatch)
            elif program == 'bash':
                check_bash(arguments)
            elif program == 'pip':
                check_pip(arguments)
            elif not program.startswith('--'):  # options to add to a command
                assert program in ('git', 'source'), program
