"""How the ecosystem's switches for Batch Normalization reach a layer."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

try:
    from mmcv.ops import SyncBatchNorm as MMSyncBatchNorm
except ImportError:  # an mmcv without ops

    class MMSyncBatchNorm(nn.Module):
        pass


_ADVICE = (
    ', as swa_utils.update_bn and PreciseBNHook do to Batch Normalization, '
    'but those of a layer of wsbcn_mm are its own. Instead, for each BCN, BGN '
    'or MABN of the model call reset_running_stats(), set momentum=None (BCN '
    'and BGN), and run training forwards over the data under no_grad().'
)


class BatchStatistics(_BatchNorm):
    """A Batch Normalization with nothing in it, to be a child of a layer.

    Tools look for ``_BatchNorm`` modules to switch something on them. A layer
    that is no ``_BatchNorm`` itself, so that none rewrites it, learns from
    this child what they wanted:

    - ``norm_eval=True`` of a backbone calls ``eval()`` on it: the estimates
      are frozen.
    - ``convert_sync_batchnorm`` (``sync_bn`` of mmengine's Runner) replaces it
      by a ``SyncBatchNorm``: the layer puts a :class:`SharedBatchStatistics`
      there, and statistics are shared between processes.
    """

    def __init__(self):
        super().__init__(0, affine=False, track_running_stats=False)
        # Tools that compute statistics look at these before they touch
        # anything else, and should get as far as the message below.
        del self.running_mean, self.running_var
        self.running_mean = self.running_var = torch.empty(0)

    @staticmethod
    def in_place_of(module: nn.Module) -> 'BatchStatistics':
        """What a layer has for what a tool wants to be its child."""
        if isinstance(module, BatchStatistics):
            return module
        if isinstance(module, nn.SyncBatchNorm):
            mine = SharedBatchStatistics(module.process_group)
        elif isinstance(module, MMSyncBatchNorm):
            mine = SharedBatchStatistics(module.group)
        else:
            mine = BatchStatistics()
        return mine.train(module.training)

    def reset_parameters(self) -> None:
        """There are none."""

    def reset_running_stats(self) -> None:
        raise RuntimeError(f'running statistics are being reset{_ADVICE}')

    def __setattr__(self, name: str, value) -> None:
        if name == 'momentum' and name in self.__dict__:
            raise RuntimeError(
                f'the momentum is being set to {value} from outside{_ADVICE}'
            )
        super().__setattr__(name, value)

    def _check_input_dim(self, input):
        raise RuntimeError('BatchStatistics normalizes nothing.')

    def extra_repr(self) -> str:
        return ''


class SharedBatchStatistics(MMSyncBatchNorm, BatchStatistics):
    """The same where statistics are shared between processes.

    ``revert_sync_batchnorm`` looks for SyncBatchNorm modules of torch or
    mmcv. This is one of mmcv's, because DistributedDataParallel refuses to
    run torch's without a GPU.

    Args:
        process_group (ProcessGroup | None): The processes. Default: None, all.
    """

    def __init__(self, process_group=None):
        BatchStatistics.__init__(self)
        # None says the same of it, and can be copied and pickled.
        is_default = dist.is_available() and process_group is dist.group.WORLD
        self.process_group = None if is_default else process_group

    forward = BatchStatistics.forward
    reset_parameters = BatchStatistics.reset_parameters
    reset_running_stats = BatchStatistics.reset_running_stats
    __repr__ = BatchStatistics.__repr__
