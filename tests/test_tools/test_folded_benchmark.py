import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / 'tools' / 'benchmarks'


@pytest.mark.slow
def test_folded_model(monkeypatch, tmp_path):
    """The small setting, so that it cannot rot."""
    pytest.importorskip('mmdet')
    monkeypatch.syspath_prepend(str(FOLDER))
    options = ['--device', 'cpu', '--small', '--repeats', '1']
    importlib.import_module('folded_model').main(
        [*options, '--out', str(tmp_path)]
    )
    for name in ('folded_model', '_harness'):
        sys.modules.pop(name)
    results = json.loads((tmp_path / 'folded_model.json').read_text())
    assert len(results['results']) == 8
    assert all(r['ms'] > 0 for r in results['results'])
    assert 'BCN + WS, folded' in (tmp_path / 'folded_model.md').read_text()
