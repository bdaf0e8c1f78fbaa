from ..layers._base import check_count

# The fewest images that an optimizer step counts as.
LEAST_IMAGES = 16


def update_rate(images_per_gpu: int = 1, images_per_update: int = 16) -> float:
    r"""The update rate of estimates that a schedule asks for.

    .. math::
        r = 0.1 \, \frac{\text{images per forward}}
                        {\max(\text{images per optimizer step}, 16)}

    Estimates must keep up with the weights, which move once per optimizer
    step, so their memory should span a fixed number of steps however few
    images a forward pass sees: ``r = 0.1`` where one forward is one step (as
    for BN), and as many times less as there are forwards in a step. But
    images differ from one another, so the memory must also span enough of
    them: steps of fewer than 16 images count as 16.

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
        0.0125
    """
    check_count('update_rate', 'images_per_gpu', images_per_gpu)
    check_count('update_rate', 'images_per_update', images_per_update)
    if images_per_gpu > images_per_update:
        raise ValueError(
            f'update_rate: images_per_update counts the images of one '
            f'optimizer step, so it is at least images_per_gpu; got '
            f'images_per_update={images_per_update} and images_per_gpu='
            f'{images_per_gpu}'
        )
    return 0.1 * images_per_gpu / max(images_per_update, LEAST_IMAGES)
