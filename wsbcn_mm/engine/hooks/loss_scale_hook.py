from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...layers import set_loss_scale


@HOOKS.register_module()
class LossScaleHook(Hook):
    """Tell layers that remember gradients what the loss is multiplied by.

    For :class:`BCN` with ``grad_averaging`` and :class:`MABN` under an
    ``AmpOptimWrapper``, whose scale changes. Others, and models under other
    wrappers, are left as they are. See :func:`wsbcn_mm.set_loss_scale`.

    Example:
        >>> custom_hooks = [dict(type='LossScaleHook')]
    """

    def before_train_iter(self, runner, batch_idx: int, data_batch=None):
        wrapper = runner.optim_wrapper
        if hasattr(wrapper, 'loss_scaler'):
            # As the step before has waited for the device, this does not.
            scale = wrapper.loss_scaler.get_scale()
            set_loss_scale(runner.model, scale)
