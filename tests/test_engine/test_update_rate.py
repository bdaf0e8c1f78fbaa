import pytest

from wsbcn_mm import update_rate


def test_rate_follows_images_per_update():
    assert update_rate(1, 16) == pytest.approx(0.1 / 16)
    assert update_rate(2, 16) == pytest.approx(0.1 / 8)
    assert update_rate(16, 16) == pytest.approx(0.1)  # BN's
    assert update_rate() == update_rate(1, 16)
    assert update_rate(2, 64) == pytest.approx(0.1 / 32)


def test_memory_spans_enough_images():
    assert update_rate(1, 1) == update_rate(1, 2) == update_rate(1, 16)
    assert update_rate(2, 2) == update_rate(2, 16)


@pytest.mark.parametrize('images', [(1.5, 16), ('1', 16), (True, 16)])
def test_type(images):
    with pytest.raises(TypeError, match='images_per_gpu.*positive integer'):
        update_rate(*images)


def test_value():
    with pytest.raises(ValueError, match='images_per_gpu.*got 0'):
        update_rate(0, 16)
    with pytest.raises(ValueError, match='images_per_update.*got -16'):
        update_rate(1, -16)
    with pytest.raises(ValueError, match='at least images_per_gpu'):
        update_rate(4, 2)
