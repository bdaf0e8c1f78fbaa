"""The normalizers by the names that tables and plots give them."""

from typing import Optional, Tuple

from wsbcn_mm.engine.update_rate import update_rate as default_update_rate


def method_cfg(
    method: str,
    *,
    images: int,
    batch_size: int,
    num_groups: int = 32,
    update_rate: Optional[float] = None,
    channel_affine: str = 'group',
) -> Tuple[dict, Optional[dict]]:
    """The ``norm_cfg`` and ``conv_cfg`` of a method.

    Args:
        method (str): ``'BN'``, ``'GN'``, ``'BCN'``, ``'BGN'`` or ``'MABN'``,
            with ``'+WS'`` or ``'+CenConv'`` for the convolutions.
            ``'BCN-large'`` is BCN with the batch's own statistics.
        images (int): Images per normalization batch.
        batch_size (int): Images per optimizer step.
        num_groups (int): Of GN, BCN and BGN. Default: 32
        update_rate (float | None): BCN's r. Default: None, what the package
            proposes for the schedule.
        channel_affine (str): BCN's.
    """
    norm, _, conv = method.partition('+')
    if update_rate is None:
        update_rate = default_update_rate(images, batch_size)
    bcn = dict(
        type='BCN',
        num_groups=num_groups,
        momentum=update_rate,
        channel_affine=channel_affine,
    )
    norms = {
        'BN': dict(type='BN'),
        'GN': dict(type='GN', num_groups=num_groups),
        'BCN': bcn,
        'BCN-large': dict(bcn, estimate=False),
        'BGN': dict(type='BGN', num_groups=num_groups),
        'MABN': dict(
            type='MABN', batch_size=images, simulated_batch_size=batch_size
        ),
    }
    convs = {'': None, 'WS': dict(type='ConvWS')}
    convs['CenConv'] = dict(type='CenConv')
    if norm not in norms or conv not in convs:
        raise ValueError(
            f'There is no method {method!r}: expected one of '
            f'{", ".join(norms)}, alone or with +WS or +CenConv.'
        )
    return norms[norm], convs[conv]
