import math
from collections import Counter
from typing import Optional

from torch import nn

from ..layers import BCN
from ..layers._base import check_count

# Of the estimates where one forward is one step of at least so many images.
RATE = 0.01
# The fewest images that an optimizer step counts as.
LEAST_IMAGES = 16
# By which a rate is known that was derived. Without a factor of five, so that
# a round rate such as 0.001 is none of these.
USUAL_STEPS = (16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)


def update_rate(images_per_gpu: int = 1, images_per_update: int = 16) -> float:
    r"""The update rate of estimates that a schedule asks for.

    .. math::
        r = 0.01 \, \frac{\text{images per forward}}
                        {\max(\text{images per optimizer step}, 16)}

    So the memory spans 100 optimizer steps, or 1,600 images where steps are
    of fewer than 16, however few images a forward pass sees. That is ten
    times as long as BN's running averages have. BN normalizes with the batch
    and takes the averages in evaluation only, where they must agree; BCN
    normalizes with its estimates in both, so they may be old. What a step
    does to the mean of a channel should not be undone by an estimate that
    follows some steps later: with AdamW fine-tuning is better with a slow
    one. With SGD ten times as fast is level, but in short trainings at high
    learning rates, where it is better in segmentation (tools/study).

    Args:
        images_per_gpu (int): Images in one forward pass of one process, or
            of all processes if they share their estimates (``SyncBCN``,
            ``SyncEstimatesHook``). Default: 1
        images_per_update (int): Images in one optimizer step, over all
            processes and accumulated passes. Default: 16

    Returns:
        float: A ``momentum`` for :class:`~wsbcn_mm.BCN`.

    Raises:
        TypeError, ValueError: If an argument is not a positive integer, or
            a forward has more images than a step.

    Example:
        >>> update_rate(images_per_gpu=2, images_per_update=16)
        0.00125
    """
    check_images('update_rate', images_per_gpu, images_per_update)
    return RATE * images_per_gpu / max(images_per_update, LEAST_IMAGES)


def check_images(
    caller: str, images_per_gpu: int, images_per_update: int
) -> None:
    """Raise, in the caller's name, unless a step has the images of a pass."""
    check_count(caller, 'images_per_gpu', images_per_gpu)
    check_count(caller, 'images_per_update', images_per_update)
    if images_per_gpu > images_per_update:
        raise ValueError(
            f'{caller}: images_per_update counts the images of one '
            f'optimizer step, so it is at least images_per_gpu; got '
            f'images_per_update={images_per_update} and images_per_gpu='
            f'{images_per_gpu}'
        )


def rate_contradiction(
    model: nn.Module,
    batch_size: int,
    accumulative_counts: int = 1,
    world_size: int = 1,
    shared: bool = False,
) -> Optional[str]:
    """Say where layers have the update rate of another run than this one.

    Looked at are micro-batch layers with an annealed rate, as
    ``micro_batch_model`` derives it from the numbers of images it was given,
    1 of 16 if none. A rate that follows from no such numbers was chosen, and
    so was one that is not annealed.

    Args:
        model (nn.Module): The model.
        batch_size (int): Images in one forward pass of one process.
        accumulative_counts (int): Passes in one optimizer step. Default: 1
        world_size (int): Number of processes. Default: 1
        shared (bool): Whether processes share all estimates
            (``SyncEstimatesHook``). Layers that share theirs by themselves
            are known. Default: False

    Returns:
        str | None: What contradicts, with the arguments to write, where a
        rate is more than 1.5 times away from :func:`update_rate`.
    """
    images = batch_size * accumulative_counts * world_size
    wrong, together = Counter(), batch_size
    for layer in model.modules():
        if (
            not isinstance(layer, BCN)
            or not layer.estimate
            or not layer.momentum_annealing
            or not _is_derived(layer.momentum)
        ):
            continue
        sharing = shared or layer.is_synchronized
        per_gpu = batch_size * world_size if sharing else batch_size
        ratio = layer.momentum / update_rate(per_gpu, images)
        if not 1 / 1.5 <= ratio <= 1.5:
            wrong[layer.momentum] += 1
            together = per_gpu
    if not wrong:
        return None
    rates = ' and '.join(f'{rate:g}' for rate in wrong)
    return (
        f'{sum(wrong.values())} BCN layers have momentum={rates}, which is '
        f'for other numbers of images than those of this run: batch_size='
        f'{batch_size}, accumulative_counts={accumulative_counts}, '
        f'{world_size} process{"es" * (world_size > 1)}, for which '
        f'{update_rate(together, images):g} is proposed. In '
        f'micro_batch_model write images_per_gpu={together}, '
        f'images_per_update={images}. A momentum chosen on purpose needs '
        'nothing.'
    )


def _is_derived(rate: Optional[float]) -> bool:
    """Whether a rate is that of whole images of usual optimizer steps."""
    for images in USUAL_STEPS:
        count = (rate or 0) / update_rate(1, images)
        if round(count) >= 1 and math.isclose(count, round(count)):
            return True
    return False
