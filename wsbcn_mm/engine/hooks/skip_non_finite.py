import logging
import math
from typing import List, Optional

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from ...layers._base import check_count
from ..errors import UsageError


@HOOKS.register_module()
class SkipNonFiniteHook(Hook):
    """Skip the optimizer's step where a gradient is infinite or NaN.

    One NaN in an image or a label, or one overflow, makes a loss and all
    gradients NaN. The layers of this package leave such a batch out of their
    estimates; an optimizer steps by it, after which every weight is NaN. With
    this hook the step is skipped, as ``GradScaler`` does in mixed precision,
    and training goes on. The log says so once, with the images of the batch,
    and the number of such iterations at the end.

    The gradients are looked at in one reduction before the step. The losses
    are those that MMEngine's ``RuntimeInfoHook`` has read already. A gradient
    that overflows below a ``GradScaler`` while the loss is finite is how the
    scaler finds its scale: nothing is said of it.

    Args:
        max_in_a_row (int): After so many such iterations, one after another,
            training has diverged and stops. Default: 100

    Raises:
        UsageError: If training has diverged.

    Example:
        >>> custom_hooks = [dict(type='SkipNonFiniteHook')]
    """

    # Before what logs or saves an iteration.
    priority = 'HIGH'

    def __init__(self, max_in_a_row: int = 100):
        self.max_in_a_row = check_count(
            type(self).__name__, 'max_in_a_row', max_in_a_row
        )
        self._count = self._in_a_row = 0
        self._skipped = False
        self._handles: list = []

    def before_train(self, runner) -> None:
        wrapper = runner.optim_wrapper
        wrappers = (
            wrapper.values() if hasattr(wrapper, 'values') else [wrapper]
        )
        for optimizer in (getattr(w, 'optimizer', None) for w in wrappers):
            if isinstance(optimizer, torch.optim.Optimizer):
                self._handles.append(
                    optimizer.register_step_pre_hook(self._before_step)
                )

    def _before_step(self, optimizer, args, kwargs) -> None:
        if getattr(optimizer, 'found_inf', None) is not None:
            return  # a fused optimizer, which skips by its GradScaler
        parameters = [
            p
            for group in optimizer.param_groups
            for p in group['params']
            if p.grad is not None
        ]
        if not _all_finite([p.grad for p in parameters]):
            self._skipped = True
            for parameter in parameters:
                parameter.grad = None

    def after_train_iter(
        self,
        runner,
        batch_idx: int,
        data_batch=None,
        outputs: Optional[dict] = None,
    ) -> None:
        loss = _last_loss(runner)
        if math.isfinite(loss) and not self._skipped:
            self._in_a_row = 0
            return
        self._skipped = False
        self._count += 1
        self._in_a_row += 1
        if self._count == 1:
            images = _images(data_batch)
            runner.logger.log(
                logging.WARNING,
                f'SkipNonFiniteHook: in iteration {runner.iter + 1} the loss '
                f'is {loss} or a gradient is not finite'
                + (f', from {", ".join(images)}' if images else '')
                + '. The step was skipped, and what is not finite was left '
                'out of the estimates. Look at the images and labels of this '
                'batch if it happens again, or lower the learning rate. '
                'Further ones are counted. The loss in the log, a mean over '
                'the last iterations, is nan for as long as it has this one.',
            )
        if self._in_a_row == self.max_in_a_row:
            raise UsageError(
                f'training has diverged: the last {self._in_a_row} iterations '
                f'gave a loss of {loss} or gradients that are not finite. '
                'Start from an earlier checkpoint with a lower learning rate, '
                'a longer warm-up or optim_wrapper.clip_grad.'
            )

    def after_train(self, runner) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._count > 1:
            runner.logger.warning(
                f'SkipNonFiniteHook: {self._count} iterations were not finite.'
            )


def _all_finite(gradients: List[Tensor]) -> bool:
    """Whether all are finite, with one value read for each device."""
    by_device: dict = {}
    for gradient in gradients:
        if gradient.is_sparse:
            gradient = gradient.coalesce().values()
        by_device.setdefault(gradient.device, []).append(gradient)
    return all(
        torch.stack(
            # The largest absolute values, since sums could overflow.
            [n.float() for n in torch._foreach_norm(on_device, math.inf)]
        )
        .isfinite()
        .all()
        for on_device in by_device.values()
    )


def _last_loss(runner) -> float:
    """The loss that RuntimeInfoHook has read; 0 where there is none."""
    scalars = runner.message_hub.log_scalars
    return scalars['train/loss'].current() if 'train/loss' in scalars else 0.0


def _images(data_batch) -> List[str]:
    """The image files of a batch, where its samples say so."""
    samples = (
        data_batch.get('data_samples')
        if isinstance(data_batch, dict)
        else None
    )
    paths = [getattr(sample, 'img_path', None) for sample in samples or ()]
    return [str(path) for path in paths if path]
