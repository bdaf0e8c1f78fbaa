"""Refuse code that folds a normalization by itself.

RepVGG's ``switch_to_deploy``, ``fuse_conv_bn``, MMCV's
``efficient_conv_bn_eval`` and their like read ``conv.weight`` and the
statistics of ``bn``, multiply them, and put the product into another layer.
With a weight that is standardized when it is used, or a normalization that
has a second part, the outputs would be others, without a word.

Such code is told by its name: of the few innermost functions that read a
parameter, one is called ``fuse...``, ``reparameterize`` and the like. Reading
as such is no fault: pruning, regularization and logging do that.
"""

import re
import sys

import torch

_FOLDS = re.compile(
    '_*(fuse(_|bn|$)|reparameteri[sz]e|switch_to_deploy|merge_kernel|'
    'get_equivalent|efficient_conv_bn|(fold|absorb|merge)_?(bn|batch|norm)|'
    'trans.*_fusebn)'
)
_DEPTH = 3
_PACKAGE = __name__.partition('.')[0]


def folding_function() -> str:
    """The function outside of this package that is folding, or ''."""
    frame = sys._getframe(2)
    for _ in range(_DEPTH):
        if (
            frame is None
            or frame.f_globals.get('__name__', '').partition('.')[0]
            == _PACKAGE
        ):
            return ''
        if _FOLDS.match(frame.f_code.co_name):
            return frame.f_code.co_name
        frame = frame.f_back
    return ''


class GuardedParameters:
    """Mixin for a layer whose parameters must not be folded from outside.

    Attributes:
        guarded (tuple[str]): Their names.
    """

    guarded = ('weight',)

    def __getattr__(self, name: str):
        if name in self.guarded and not torch.compiler.is_compiling():
            function = folding_function()
            if function:
                kind = type(self).__name__
                raise RuntimeError(
                    f'{function}() reads {name} of a {kind} to fold a '
                    f'normalization, but {name} alone does not tell what '
                    f'a {kind} computes: the outputs would be wrong. Use '
                    'wsbcn_mm.fold_for_inference(model) instead, which leaves '
                    'only standard layers that compute the same.'
                )
        return super().__getattr__(name)
