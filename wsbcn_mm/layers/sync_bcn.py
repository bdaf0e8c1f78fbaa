from mmengine.registry import MODELS

from .bcn import BCN


@MODELS.register_module(name='SyncBCN', force=True)
class SyncBCN(BCN):
    r"""Batch-Channel Normalization with one batch over all processes.

    Two processes with one image each compute what one with two computes:
    outputs, gradients and estimates. Every image counts the same, whichever
    process has it, and a process may have none, as where a detector's head
    got no proposal.

    With ``estimate=True`` a training forward costs one small gathering of
    moments (2 C + 2 numbers from each process), and the backward pass costs
    no communication, since estimates carry no gradient. With
    ``grad_averaging``, which is over the images of all processes, the
    backward pass costs one small gathering (4 C numbers from each). With
    ``estimate=False`` it takes one small reduction, as in
    :class:`torch.nn.SyncBatchNorm`. Every process must run the layer, and
    with ``grad_averaging`` or ``estimate=False`` its backward, as often as
    the others. Evaluation and frozen estimates communicate nothing, nor does
    a single process.

    Gradients are those of the sum of the processes' losses: the input's as
    they are, a parameter's once summed over processes. DistributedDataParallel
    averages instead, so that it gives the gradient of the mean of the losses,
    as it does for any layer.

    A :class:`BCN` does the same after ``sync_bn`` of mmengine's Runner
    (``'torch'`` or ``'mmcv'``) or ``SyncBatchNorm.convert_sync_batchnorm``.
    Their checkpoints are the same. Without other processes this is a
    :class:`BCN`, so ``revert_sync_batchnorm`` leaves it as it is.
    :class:`SyncEstimatesHook` is cheaper still.

    Args:
        *args: Positional arguments of :class:`BCN`.
        **kwargs: Its keyword arguments.
        process_group (ProcessGroup | None): The processes. Default: None,
            all of them.

    Example:
        >>> import torch
        >>> norm = SyncBCN(64, momentum=0.01 * 2 / 16)  # 2 GPUs, 1 image each
        >>> norm(torch.randn(1, 64, 50, 76)).shape
        torch.Size([1, 64, 50, 76])
    """

    def __init__(
        self, *args, process_group=None, device=None, dtype=None, **kwargs
    ):
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.synchronize(process_group)
