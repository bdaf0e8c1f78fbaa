"""Issue forms, the workflow and the citation agree with the package."""

import re

import pytest
import yaml
from markdown_pages import ROOT

import wsbcn_mm

FORMS = sorted((ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml'))


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize('form', FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_github_asks_for(form):
    content = read(form)
    assert {'name', 'description', 'body'} <= content.keys()
    names = [field['id'] for field in content['body']]
    assert len(set(names)) == len(names)
    assert all(field['attributes']['label'] for field in content['body'])


def test_commands_that_issue_forms_ask_for_run(capsys):
    commands = [
        command
        for form in FORMS
        for command in re.findall(r'python -c "(.*)"', form.read_text())
    ]
    assert commands
    for command in commands:
        exec(command, {})
        out = capsys.readouterr().out
        assert wsbcn_mm.__version__ in out
        assert 'MMEngine' in out


def test_workflow_runs_the_two_commands():
    jobs = read('.github/workflows/ci.yml')['jobs'].values()
    commands = [s['run'] for job in jobs for s in job['steps'] if 'run' in s]
    for name in ('run_tests.sh', 'quickstart.sh'):
        assert any(name in command for command in commands)


def test_citation_is_of_this_version():
    assert read('CITATION.cff')['version'] == wsbcn_mm.__version__
    assert (
        f'## {wsbcn_mm.__version__}\n' in (ROOT / 'CHANGELOG.md').read_text()
    )
