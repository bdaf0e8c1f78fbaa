from typing import Any, Callable, Dict, Iterable, List, Optional

import torch
import torch.distributed as dist
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Subset

from ...functional import moments
from ...layers import BCN
from ...layers._base import check_count
from ..random_state import preserved_random_state

# A loaded identity is exact up to float32; a new layer's is off by eps / 2.
IDENTITY_TOLERANCE = 1e-6


class _Statistics:
    """A layer's batch statistics over all the images it has seen."""

    def __init__(self, layer: BCN):
        size = 2 * layer.num_features + 1
        self.sums = torch.zeros(
            size, dtype=torch.float64, device=layer.running_mean.device
        )

    def add(self, layer: BCN, inputs) -> None:
        (x,) = inputs
        if x.numel():
            mean, var = (t.double() for t in moments(x))
            second = (var + mean.square()).sum(0)
            count = mean.new_tensor([len(x)])
            self.sums += torch.cat([count, mean.sum(0), second])

    def result(self):
        count, mean, second = self.sums.tensor_split(
            [1, 1 + len(self.sums) // 2]
        )
        mean = mean / count
        return count.item(), mean, (second / count - mean.square()).clamp(0)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Optional[Callable[[nn.Module, Any], Any]] = None,
) -> List[str]:
    r"""Give layers with an identity for a batch part true estimates.

    A Group Normalization checkpoint makes the batch part of a :class:`BCN`
    the identity, :math:`\mu = 0, \sigma^2 + \epsilon = 1`. Training moves
    these estimates to the true statistics, and with them the outputs away
    from those of the checkpoint. So measure the statistics first, and set

    .. math::
        \mu = m, \quad \sigma^2 = v, \quad
        \gamma^b = \sqrt{v + \epsilon}, \quad \beta^b = m

    The outputs stay the same, now and while training keeps the estimates
    where they are. One pass suffices for all layers, since none changes what
    the next one sees. Layers whose batch part is no identity are left alone.

    In distributed training every process is to call this, each with its own
    batches; all get the same estimates.

    Args:
        model (nn.Module): The network, after its checkpoint was loaded. It
            is run in the mode that it is in, without updating anything.
        batches (Iterable): What to run it on.
        forward (Callable | None): ``forward(model, batch)``. Default: None,
            ``model(batch)``, or the loss of a ``BaseModel`` of MMEngine.

    Returns:
        list[str]: Names of the layers that got estimates.

    Example:
        >>> norm = BCN(8, 4, channel_affine='channel')
        >>> norm.load_state_dict(nn.GroupNorm(4, 8).state_dict())
        <All keys matched successfully>
        >>> calibrate(norm, [torch.randn(2, 8, 5, 5) + 3])
        ['']
        >>> bool(norm.running_mean.mean() > 2)
        True
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, BCN)
    }
    candidates = {n: m for n, m in layers.items() if _is_identity(m)}
    if len(candidates) < len(layers):
        print_log(
            f'calibrate: {len(layers) - len(candidates)} of {len(layers)} BCN '
            'layers are left alone, since their batch part is no identity '
            '(new, or loaded from another checkpoint than a GN one).',
            'current',
        )
    if not candidates:
        return []
    statistics = {name: _Statistics(m) for name, m in candidates.items()}
    hooks = [
        layer.register_forward_pre_hook(statistics[name].add)
        for name, layer in candidates.items()
    ]
    # What tracks statistics is not to, and the model's mode is to come back.
    tracking = [
        m for m in model.modules() if isinstance(m, _BatchNorm) and m.training
    ]
    try:
        for m in tracking:
            m.training = False
        for batch in batches:
            (forward or _forward)(model, batch)
    finally:
        for m in tracking:
            m.training = True
        for hook in hooks:
            hook.remove()
    if get_world_size() > 1:
        for s in statistics.values():
            dist.all_reduce(s.sums)
    return _set_estimates(candidates, statistics)


def _forward(model: nn.Module, batch: Any) -> None:
    inner = model.module if is_model_wrapper(model) else model
    if isinstance(inner, BaseModel):
        data = inner.data_preprocessor(batch, True)
        inner._run_forward(data, mode='loss')
    else:
        model(batch)


def _is_identity(layer: BCN) -> bool:
    scale = layer.batch_weight * (layer.running_var + layer.eps).rsqrt()
    shift = layer.batch_bias - layer.running_mean * scale
    return bool(
        ((scale - 1).abs() < IDENTITY_TOLERANCE).all()
        and (shift.abs() < IDENTITY_TOLERANCE).all()
    )


def _set_estimates(
    layers: Dict[str, BCN], statistics: Dict[str, _Statistics]
) -> List[str]:
    done = []
    for name, layer in layers.items():
        count, mean, var = statistics[name].result()
        if not (count and mean.isfinite().all() and var.isfinite().all()):
            print_log(
                f'calibrate: {name} is left alone, since it has seen '
                + ('infinite or NaN activations.' if count else 'no image.'),
                'current',
            )
            continue
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
        layer.batch_weight.copy_((layer.running_var + layer.eps).sqrt())
        layer.batch_bias.copy_(layer.running_mean)
        # What a cumulative average (momentum=None) goes on from.
        layer.num_batches_tracked.fill_(int(count))
        done.append(name)
    return done


def _evenly(loader: DataLoader, num_images: int) -> DataLoader:
    """This process's share of images from all over a loader's data set.

    A loader of its own: an iteration of the training's one would advance
    the InfiniteSampler that its iterations share.
    """
    dataset = loader.dataset
    try:
        num_images = min(num_images, len(dataset))
    except TypeError as error:
        raise TypeError(
            'CalibrateEstimatesHook chooses images from all over the training '
            f'set, but {type(dataset).__name__} has no length. Instead, call '
            'wsbcn_mm.engine.calibrate(model, batches) before the training '
            'with some batches of it'
        ) from error
    chosen = [i * len(dataset) // num_images for i in range(num_images)]
    return DataLoader(
        Subset(dataset, chosen[get_rank() :: get_world_size()]),
        collate_fn=loader.collate_fn,
    )


@HOOKS.register_module()
class CalibrateEstimatesHook(Hook):
    """Measure the batch statistics of a loaded GN checkpoint.

    Before training, runs images from all over the training set, one at a
    time, through the model as :func:`calibrate` says. It does nothing when
    training is resumed. The random numbers of the training are those without
    the hook.

    Args:
        num_images (int): How many images, over all processes. Default: 64

    Example:
        >>> custom_hooks = [dict(type='CalibrateEstimatesHook')]
    """

    def __init__(self, num_images: int = 64):
        self.num_images = check_count(
            type(self).__name__, 'num_images', num_images
        )

    def before_train(self, runner) -> None:
        if runner._resume or runner.iter > 0:
            runner.logger.info(
                'CalibrateEstimatesHook does nothing: training is resumed, '
                'with the estimates of the checkpoint.'
            )
            return
        mode = runner.model.training
        runner.model.train()
        with preserved_random_state():
            loader = _evenly(runner.train_dataloader, self.num_images)
            done = calibrate(runner.model, loader)
        runner.model.train(mode)
        found = min(self.num_images, len(runner.train_dataloader.dataset))
        fewer = ', all that there are' if found < self.num_images else ''
        runner.logger.info(
            f'CalibrateEstimatesHook: {len(done)} layers got estimates from '
            f'{found} images{fewer}.'
        )
