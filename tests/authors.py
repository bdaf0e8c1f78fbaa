"""What the authors' released code computes, for checkpoints to be held to.

Written anew after https://github.com/joe-siyuan-qiao/
Batch-Channel-Normalization: ``imagenet/models`` and ``DeepLabV3/deeplab.py``.
The names of modules are theirs, and so are the keys of a state dict.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


class Conv2d(nn.Conv2d):
    """A convolution with a standardized weight."""

    eps_inside_sqrt = False

    def forward(self, x):
        centered = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        var = centered.flatten(1).var(1)
        if self.eps_inside_sqrt:
            std = (var + 1e-5).sqrt()
        else:
            std = var.sqrt() + 1e-5
        weight = centered / std.view(-1, 1, 1, 1)
        return self._conv_forward(x, weight, self.bias)


class ImageNetConv2d(Conv2d):
    eps_inside_sqrt = True


class BCNorm(nn.Module):
    """BN, and a normalization of groups with one affine pair each."""

    def __init__(self, channels, num_groups=32):
        super().__init__()
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(1, num_groups, 1))
        self.bias = nn.Parameter(torch.zeros(1, num_groups, 1))
        self.pbn = nn.BatchNorm2d(channels)

    def forward(self, x):
        rows = self.pbn(x).view(len(x), self.num_groups, -1)
        var, mean = torch.var_mean(rows, 2, correction=0, keepdim=True)
        rows = (rows - mean) / (var + 1e-5).sqrt()
        return (self.weight * rows + self.bias).view_as(x)


class ASPP(nn.Module):
    """The head of their DeepLabV3, ending with the logits."""

    def __init__(self, channels, depth, num_classes):
        super().__init__()
        for i, dilation in enumerate((0, 6, 12, 18), 1):
            conv = Conv2d(
                channels,
                depth,
                3 if dilation else 1,
                dilation=dilation or 1,
                padding=dilation,
                bias=False,
            )
            self.add_module(f'aspp{i}', conv)
        self.aspp5 = Conv2d(channels, depth, 1, bias=False)
        for i in range(1, 6):
            self.add_module(f'aspp{i}_bn', BCNorm(depth))
        self.conv2 = Conv2d(5 * depth, depth, 1, bias=False)
        self.bn2 = BCNorm(depth)
        self.conv3 = nn.Conv2d(depth, num_classes, 1)

    def branch(self, i, x):
        y = getattr(self, f'aspp{i}')(x)
        return getattr(self, f'aspp{i}_bn')(y).relu()

    def forward(self, x):
        branches = [self.branch(i, x) for i in range(1, 5)]
        pooled = self.branch(5, x.mean((2, 3), keepdim=True))
        branches.append(pooled.expand_as(branches[0]))
        return self.conv3(self.bn2(self.conv2(torch.cat(branches, 1))).relu())


class DeepLab(ResNet):
    """Their DeepLabV3: output stride 16."""

    def __init__(self, layers, num_classes):
        super().__init__(
            Bottleneck,
            layers,
            norm_layer=BCNorm,
            replace_stride_with_dilation=[False, False, True],
        )
        del self.fc
        self.aspp = ASPP(2048, 256, num_classes)

    def features(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return x

    def forward(self, x):
        logits = self.aspp(self.features(x))
        return F.interpolate(
            logits, x.shape[2:], mode='bilinear', align_corners=True
        )


def classifier(layers=(2, 2, 2, 2), block=BasicBlock, **kwargs):
    """Return their ImageNet network, evaluated in float64."""
    net = ResNet(block, layers, norm_layer=BCNorm, **kwargs)
    return _trained(net, ImageNetConv2d)


def resnext():
    """Return their ResNeXt-50 32x4d."""
    return classifier((3, 4, 6, 3), Bottleneck, groups=32, width_per_group=4)


def deeplab(layers=(3, 4, 6, 3), num_classes=21):
    """Return their DeepLabV3, evaluated in float64."""
    return _trained(DeepLab(layers, num_classes), Conv2d)


def _trained(net, conv):
    """Put numbers everywhere, with weights small enough that eps matters."""
    for module in net.modules():
        if type(module) is nn.Conv2d and module.bias is None:
            module.__class__ = conv
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.dim() == 4:
                value.normal_(0.001, 0.004)
            elif name.endswith(('bias', 'running_mean')):
                value.normal_(0, 0.2)
            elif value.is_floating_point() and value.dim() != 2:
                value.uniform_(0.5, 1.5)
    return net.double().eval()
