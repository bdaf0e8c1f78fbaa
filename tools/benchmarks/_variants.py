"""The layers that BCN and ConvWS are compared with."""

import torch
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

MODELS.register_module('MMCVConvWS', module=ConvWS2d, force=True)


class _Estimates(nn.Module):
    """Batch normalization with estimates, in plain operations."""

    def __init__(self, num_features: int, momentum=0.001, eps=1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer('running_mean', torch.zeros(num_features))
        self.register_buffer('running_var', torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                mean = x.mean((0, 2, 3))
                centered = x - self.running_mean[:, None, None]
                var = centered.square().mean((0, 2, 3))
                self.running_mean += self.momentum * (mean - self.running_mean)
                self.running_var += self.momentum * (var - self.running_var)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - scale * self.running_mean
        return x * scale[:, None, None] + shift[:, None, None]


class _Groups(nn.GroupNorm):
    """What both have after the estimates: a scale and a shift a group."""

    _abbr_ = 'bcn'

    def __init__(self, num_features: int, num_groups: int = 32, eps=1e-5):
        super().__init__(num_groups, num_features, eps, affine=False)
        self.estimates = _Estimates(num_features, eps=eps)
        self.weight = nn.Parameter(torch.ones(num_groups))
        self.bias = nn.Parameter(torch.zeros(num_groups))


@MODELS.register_module(force=True)
class TextbookBCN(_Groups):
    """The formulas as they are printed."""

    def forward(self, x: Tensor) -> Tensor:
        groups = self.estimates(x).unflatten(1, (self.num_groups, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        var = (groups - mean).square().mean((2, 3, 4), keepdim=True)
        groups = (groups - mean) / (var + self.eps).sqrt()
        rows = (-1, 1, 1, 1)
        return (groups * self.weight.view(rows) + self.bias.view(rows)).view(
            x.shape
        )


@MODELS.register_module(force=True)
class EstimatesThenGroupNorm(_Groups):
    """Estimates, then torch's own Group Normalization."""

    def forward(self, x: Tensor) -> Tensor:
        repeats = x.shape[1] // self.num_groups
        return F.group_norm(
            self.estimates(x),
            self.num_groups,
            self.weight.repeat_interleave(repeats),
            self.bias.repeat_interleave(repeats),
            self.eps,
        )


@MODELS.register_module(force=True)
class AuthorsBCN(_Groups):
    """The authors' form: groups are channels of a batch normalization."""

    def forward(self, x: Tensor) -> Tensor:
        samples = x.shape[0]
        rows = self.estimates(x).reshape(1, samples * self.num_groups, -1)
        rows = F.batch_norm(rows, None, None, training=True, eps=self.eps)
        rows = rows.view(samples, self.num_groups, -1)
        return (rows * self.weight[:, None] + self.bias[:, None]).view_as(x)


class BatchThenGroupNorm(nn.Sequential):
    def __init__(self, num_features: int):
        super().__init__(
            nn.BatchNorm2d(num_features), nn.GroupNorm(32, num_features)
        )
