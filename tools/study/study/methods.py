"""The normalizers by the names that tables and plots give them."""

from typing import Optional, Tuple, Union

from wsbcn_mm.engine.components import with_rate


def method_cfg(
    method: str,
    *,
    images: int,
    batch_size: int,
    num_groups: int = 32,
    update_rate: Optional[float] = None,
    channel_affine: str = 'group',
    momentum_annealing: bool = True,
    grad_averaging: Union[int, float, None] = None,
    simulated_batch_size: Optional[int] = None,
) -> Tuple[dict, Optional[dict]]:
    """The ``norm_cfg`` and ``conv_cfg`` of a method.

    Args:
        method (str): ``'BN'``, ``'IN'``, ``'GN'``, ``'BCN'``, ``'BGN'`` or
            ``'MABN'``, with ``'+WS'``, ``'+WN'``, ``'+CWN'`` or
            ``'+CenConv'`` for the convolutions.
            ``'BCN-large'`` is BCN with the batch's own statistics.
        images (int): Images per normalization batch.
        batch_size (int): Images per optimizer step.
        num_groups (int): Of GN, BCN and BGN. Default: 32
        update_rate (float | None): BCN's r. Default: None, for what the
            package proposes.
        channel_affine (str), momentum_annealing (bool): BCN's.
        grad_averaging (int | float | None): BCN's, for estimates.
        simulated_batch_size (int | None): MABN's window. Default: None, for
            what the package proposes.
    """
    norm, _, conv = method.partition('+')
    bcn = dict(
        type='BCN', num_groups=num_groups, channel_affine=channel_affine
    )
    norms = {
        'BN': dict(type='BN'),
        'BN-frozen': dict(type='BN'),  # by tasks.openmmlab, once pretrained
        'IN': dict(type='IN', affine=True),
        'GN': dict(type='GN', num_groups=num_groups),
        'BCN': dict(bcn, grad_averaging=grad_averaging),
        'BCN-large': dict(bcn, estimate=False),
        'BGN': dict(type='BGN', num_groups=num_groups),
        'MABN': dict(type='MABN'),
    }
    convs = {
        '': None,
        'WS': dict(type='ConvWS'),
        'WN': dict(type='ConvWN'),
        'CWN': dict(type='ConvCWN'),
        'CenConv': dict(type='CenConv'),
    }
    if norm not in norms or conv not in convs:
        raise ValueError(
            f'There is no method {method!r}: expected one of '
            f'{", ".join(norms)}, alone or with +WS, +WN, +CWN or +CenConv.'
        )
    if simulated_batch_size is not None:
        norms['MABN']['simulated_batch_size'] = simulated_batch_size
    norm_cfg = with_rate(norms[norm], images, batch_size)
    if norm in ('BCN', 'BCN-large'):
        if update_rate is not None:
            norm_cfg['momentum'] = update_rate
        norm_cfg['momentum_annealing'] = momentum_annealing
    return norm_cfg, convs[conv]
