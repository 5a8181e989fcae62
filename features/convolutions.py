"""Convolutions as a processor likes them: normalisation folded in, ReLU done with them, channels together.

The same network up to rounding. In NCHW, oneDNN reorders every tensor, each normalisation and ReLU is one
more walk through memory, and ATen computes 1x1 convolutions of one thread by a slow path of its own.
`fused` is for layers in a row, `Joined` for where two maps meet.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops.misc import FrozenBatchNorm2d

NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


def knows_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Convolution(nn.Module):
    """A convolution with the normalisation and the ReLU that follow it, if they do; for evaluation only."""

    def __init__(self, source: nn.Conv2d, norm: nn.Module | None = None, *, relu: bool) -> None:
        super().__init__()
        weight, bias = source.weight, source.bias
        if norm is not None:
            of_norm: Any = norm
            weight, bias = fuse_conv_bn_weights(
                weight,
                bias,
                of_norm.running_mean,
                of_norm.running_var,
                of_norm.eps,
                of_norm.weight,
                of_norm.bias,
            )
        if bias is None:
            bias = weight.new_zeros(len(weight))
        weight = weight.detach().contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.padding: list[int] = list(source.padding)  # type: ignore[arg-type]
        self.stride, self.dilation = list(source.stride), list(source.dilation)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # asked for by name, so that ATen does not choose
            then = "relu" if self.relu else "none"
            # oneDNN refuses bfloat16 on processors that do not know it; float32 holds the same numbers.
            known = torch.float32 if x.dtype == torch.bfloat16 and not knows_bfloat16() else x.dtype
            of_all = (tensor.to(known) for tensor in (x, self.weight, self.bias))
            return torch.ops.mkldnn._convolution_pointwise(
                *of_all, self.padding, self.stride, self.dilation, 1, then, [], ""
            ).to(x.dtype)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        return x.relu_() if self.relu else x


class Halved(nn.Module):
    """The greatest of each 2 x 2, in a sixth of the time of ATen, which keeps indices too."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows = x[:, :, : height // 2 * 2, : width // 2 * 2].permute(0, 2, 3, 1)
        rows = rows.reshape(batch, height // 2, 2, width // 2, 2 * channels)
        pairs = torch.maximum(rows[:, :, 0], rows[:, :, 1]).unflatten(3, (2, channels))
        return torch.maximum(pairs[..., 0, :], pairs[..., 1, :]).permute(0, 3, 1, 2)


class Joined(nn.Module):
    """A 1 x 1 convolution and ReLU over `x`, enlarged, and `skip` side by side, where they never are put.

    Enlarging is linear, so that `x` is convolved while it is small.
    """

    def __init__(self, over_both: Convolution, num_skip: int) -> None:
        super().__init__()
        assert over_both.relu
        assert over_both.weight.shape[2:] == (1, 1)
        self.of_x, self.of_skip = copy.deepcopy(over_both), copy.deepcopy(over_both)
        weights = over_both.weight.split([over_both.weight.shape[1] - num_skip, num_skip], dim=1)
        for part, weight in zip((self.of_x, self.of_skip), weights, strict=True):
            mine = weight.contiguous(memory_format=torch.channels_last)
            part.weight, part.relu = nn.Parameter(mine, requires_grad=False), False
        nn.init.zeros_(self.of_x.bias)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.of_x(x)
        if x.shape[2:] != skip.shape[2:]:
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        return self.of_skip(skip).add_(x).relu_()


class Bottleneck(nn.Module):
    """A block of torchvision's ResNet."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.main = nn.Sequential(
            Convolution(source.conv1, source.bn1, relu=True),  # type: ignore[arg-type]
            Convolution(source.conv2, source.bn2, relu=True),  # type: ignore[arg-type]
            Convolution(source.conv3, source.bn3, relu=False),  # type: ignore[arg-type]
        )
        self.shortcut = fused(source.downsample) if source.downsample is not None else nn.Identity()  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).add_(self.shortcut(x)).relu_()


def _halves(pool: nn.MaxPool2d) -> bool:
    asked = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices
    return asked == (2, 2, 0, 1, False, False)


def fused(layers: Iterable[nn.Module]) -> nn.Sequential:
    """Convolution, normalisation and ReLU as one, blocks likewise; other layers as they are."""
    rest, made = list(layers), []
    while rest:
        layer = rest.pop(0)
        if isinstance(layer, nn.Conv2d):
            norm = rest.pop(0) if rest and isinstance(rest[0], NORMS) else None
            relu = bool(rest) and isinstance(rest[0], nn.ReLU)
            if relu:
                rest.pop(0)
            layer = Convolution(layer, norm, relu=relu)
        elif hasattr(layer, "bn3"):
            layer = Bottleneck(layer)
        elif isinstance(layer, nn.MaxPool2d) and _halves(layer):
            layer = Halved()
        elif isinstance(layer, nn.Sequential):
            layer = fused(layer)
        made.append(layer)
    return nn.Sequential(*made)


class Cast(nn.Module):
    """`inner` in `dtype` between float32 and float32."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner.to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.to(self.dtype).contiguous(memory_format=torch.channels_last)).float()
