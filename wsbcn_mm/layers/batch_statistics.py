"""How the ecosystem's switches for Batch Normalization reach a layer."""

from torch.nn.modules.batchnorm import _BatchNorm


class BatchStatistics(_BatchNorm):
    """A Batch Normalization with nothing in it, to be a child of a layer.

    Tools look for ``_BatchNorm`` modules to switch something on them. A layer
    that is no ``_BatchNorm`` itself, so that none rewrites it, learns from
    this child what they wanted:

    - ``norm_eval=True`` of a backbone calls ``eval()`` on it: the estimates
      are frozen.
    - ``convert_sync_batchnorm`` (``sync_bn`` of mmengine's Runner) replaces it
      by a ``SyncBatchNorm``: statistics are shared between processes.
    """

    def __init__(self):
        super().__init__(0, affine=False, track_running_stats=False)

    def _check_input_dim(self, input):
        raise RuntimeError('BatchStatistics normalizes nothing.')

    def extra_repr(self) -> str:
        return ''
