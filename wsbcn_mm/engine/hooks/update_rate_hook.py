from typing import Iterator

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS

from ...layers import BCN


@HOOKS.register_module()
class UpdateRateHook(Hook):
    r"""Let the update rate of BCN's estimates follow the learning rate.

    .. math::
        r_t = r \, \frac{\eta_t}{\eta_0}

    with r the ``momentum`` that a layer was built with, :math:`\eta_t` the
    learning rate of the iteration and :math:`\eta_0` the one that warm-up
    leads to and decay starts from. The estimates have to follow the weights,
    and the learning rate says how fast these move: an r that suits a high
    one is too fast for the rest of the schedule.

    So r is that of the highest learning rate here, and may be fast:
    ``momentum = 0.5 * images per forward / max(images per optimizer step,
    16)``, 0.03 at one image of 16, which is 50 times :func:`update_rate`
    (tools/study, an update rate that follows the learning rate).

    Layers with ``estimate=False`` are left alone, their averages being for
    evaluation only, and so are those without a rate (``momentum=None``).
    ``momentum_annealing`` holds as ever: in forward t the rate is at least
    :math:`1 / (1 + t)`.

    Example:
        >>> norm_cfg = dict(type='BCN', num_groups=32, momentum=0.5 / 16,
        ...                 momentum_annealing=True)
        >>> custom_hooks = [dict(type='UpdateRateHook')]
    """

    def before_train(self, runner) -> None:
        self._rates = {
            layer: layer.momentum
            for layer in runner.model.modules()
            if isinstance(layer, BCN)
            and layer.estimate
            and layer.momentum is not None
        }
        if not self._rates:
            runner.logger.warning(
                'UpdateRateHook: the model has no BCN with estimate=True and '
                'a momentum, so there is no update rate to change.'
            )

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        share = max(_shares(runner.optim_wrapper), default=1.0)
        for layer, rate in self._rates.items():
            layer.momentum = min(rate * share, 1.0)

    def after_train(self, runner) -> None:
        for layer, rate in self._rates.items():
            layer.momentum = rate


def _shares(optim_wrapper) -> Iterator[float]:
    """Of its highest learning rate, what each parameter group has now."""
    if isinstance(optim_wrapper, OptimWrapperDict):
        for part in optim_wrapper.values():
            yield from _shares(part)
        return
    for group in optim_wrapper.param_groups:
        highest = group.get('initial_lr', group['lr'])  # a scheduler's note
        if highest:
            yield group['lr'] / highest
