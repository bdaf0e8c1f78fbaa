"""Everything that tools/hard_use does to the package leaves nothing lost."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools' / 'hard_use'))

from hard_use import ATTACKS, Bench, make_scenes  # noqa: E402


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp('data') / 'scenes')


@pytest.mark.parametrize(
    'attack',
    [
        pytest.param(
            attack,
            id=attack.run.__name__,
            marks=[pytest.mark.slow] if attack.slow else [],
        )
        for attack in ATTACKS
    ],
)
def test_nothing_is_lost(attack, scenes, tmp_path):
    bench = Bench(tmp_path / 'bench', scenes)
    attack.run(bench)
    assert bench.tried
    assert not bench.lost, '\n'.join(f'{w}: {why}' for w, why in bench.lost)
