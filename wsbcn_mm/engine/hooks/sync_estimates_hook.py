from typing import List, Optional

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ...layers._base import NormBase, check_count
from ...layers.batch import shared_group

ESTIMATES = ('running_mean', 'running_var')


@HOOKS.register_module()
class SyncEstimatesHook(Hook):
    r"""Keep the estimates of all processes equal, at one all-reduce a step.

    After a training iteration the estimates (``running_mean``,
    ``running_var``) of all our normalization layers are averaged over
    processes, in one all-reduce of one vector for the whole network, where
    :class:`SyncBCN` communicates once for each layer. What it changes,
    against one process that has all the images:

    - A forward normalizes with the process's own update of the estimates,
      which are equal from the next iteration on. So outputs and gradients
      of the step differ, by what the other processes' images would have
      moved the estimates at the update rate r.
    - The estimates that result are the same, in :class:`BCN` with
      ``estimate=True``, where processes have equally many images, the layer
      runs once a step and ``interval`` is 1. For each process moves equal
      estimates by the same share, the variance's squares being about the old
      mean, which all have, so that the average of :math:`\sigma^2 + r (v_k +
      (m_k - \mu)^2 - \sigma^2)` over processes k is the estimate from the
      average.
    - Otherwise it is an approximation. A process counts the same however
      few images it has, and one without any holds its old estimates. In
      ``estimate=False`` and :class:`BGN` the variance within a process's
      batch is averaged and that between processes left out, and so in
      :class:`MABN`, whose buffers of the last batches stay each process's
      own.

    Layers that are synchronized already (:class:`SyncBCN`, ``sync_bn``) or
    frozen (``norm_eval``) are left alone, and with one process there is
    nothing to do. A statistic that is infinite or NaN has never come into an
    estimate.

    Args:
        interval (int): Every how many iterations. Default: 1

    Example:
        >>> custom_hooks = [dict(type='SyncEstimatesHook')]
    """

    # Before what looks at or copies the model: EMAHook, CheckpointHook.
    priority = 'ABOVE_NORMAL'

    def __init__(self, interval: int = 1):
        self.interval = check_count(type(self).__name__, 'interval', interval)

    def after_train_iter(
        self,
        runner,
        batch_idx: int,
        data_batch=None,
        outputs: Optional[dict] = None,
    ) -> None:
        if self.every_n_train_iters(runner, self.interval):
            average_estimates(runner.model)


@torch.no_grad()
def average_estimates(model: nn.Module) -> None:
    """Average the estimates of our layers over all processes, in place."""
    if not dist.is_available() or not dist.is_initialized():
        return
    world_size = dist.get_world_size()
    estimates = _estimates(model)
    if world_size == 1 or not estimates:
        return
    vector = torch.cat([e.flatten().double() for e in estimates])
    dist.all_reduce(vector)
    vector /= world_size
    averages = vector.split([e.numel() for e in estimates])
    for estimate, average in zip(estimates, averages):
        estimate.copy_(average.view_as(estimate))


def _estimates(model: nn.Module) -> List[Tensor]:
    return [
        getattr(layer, name)
        for layer in model.modules()
        if isinstance(layer, NormBase)
        and layer.training
        and layer.track_running_stats
        and shared_group(layer) is None
        for name in ESTIMATES
        if name in layer.statistics
    ]
