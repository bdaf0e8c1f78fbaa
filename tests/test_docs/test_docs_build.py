"""The documentation builds without a warning, and the tutorial runs."""

import os
import subprocess
import sys

import pytest
from markdown_pages import ROOT

TUTORIAL = ROOT / 'docs/tutorial.ipynb'


@pytest.mark.slow
def test_docs_build_without_warnings(tmp_path):
    pytest.importorskip('sphinx')
    done = subprocess.run(
        ['bash', 'tools/build_docs.sh', str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, 'PYTHON': sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'BCN' in (tmp_path / 'api.html').read_text()


@pytest.mark.slow
def test_tutorial_runs_and_says_what_its_text_says():
    nbclient = pytest.importorskip('nbclient')
    nbformat = pytest.importorskip('nbformat')
    notebook = nbformat.read(TUTORIAL, as_version=4)
    check = (
        "assert final['BCN + WS'] > final['BN'] + 5\n"
        "assert final['BN, own statistics'] > final['BN'] + 5\n"
        "assert not any(type(m).__module__.startswith('wsbcn_mm')\n"
        '               for m in folded.modules())\n'
    )
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    nbclient.NotebookClient(notebook, timeout=300).execute()
