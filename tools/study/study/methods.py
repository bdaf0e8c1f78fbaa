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
            ``'BCN-large'`` is BCN with the batch's own statistics;
            ``'BN-slow'`` is BN whose running averages remember as many images
            as those of BCN.
        images (int): Images per normalization batch.
        batch_size (int): Images per optimizer step.
        num_groups (int): Of GN, BCN and BGN. Default: 32
        update_rate (float | None): BCN's r. Default: None, what the package
            proposes for the schedule.
        channel_affine (str): BCN's.
    """
    norm, _, conv = method.partition('+')
    slow = default_update_rate(images, batch_size)
    rate = slow if update_rate is None else update_rate
    bcn = dict(
        type='BCN', num_groups=num_groups, channel_affine=channel_affine
    )
    norms = {
        'BN': dict(type='BN'),
        'BN-slow': dict(type='BN', momentum=slow),
        'GN': dict(type='GN', num_groups=num_groups),
        'BCN': dict(bcn, momentum=rate),
        'BCN-large': dict(bcn, estimate=False, momentum=slow),
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
