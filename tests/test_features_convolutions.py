import pytest
import torch
from torch import nn
from torch.nn import functional as F

from features import convolutions
from features.convolutions import Convolution, Halved, Joined, fused


def seeded(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (2, 3)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_halving_takes_the_greatest_as_max_pooling_does(dtype, size, layout):
    x = seeded(2, 5, *size, dtype=dtype).contiguous(memory_format=layout)
    halved = Halved()(x)
    assert torch.equal(halved, F.max_pool2d(x, 2))
    assert halved.is_contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def test_a_processor_without_bfloat16_convolves_the_same_numbers_in_float32(monkeypatch):
    monkeypatch.setattr(convolutions, "knows_bfloat16", lambda: False)
    convolution = Convolution(nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6).eval(), relu=True)
    x = seeded(2, 5, 8, 6, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    rounded = convolution.to(torch.bfloat16)
    found = rounded(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rounded.float()(x.float()).to(torch.bfloat16))


def test_only_pools_of_two_by_two_are_halvings():
    pools = [
        nn.MaxPool2d(2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d((2, 1), (2, 1)),
    ]
    assert [isinstance(one, Halved) for one in fused(pools)] == [True, False, False, False]


@pytest.mark.parametrize("size", [(4, 3), (8, 6), (7, 5)])
@torch.inference_mode()
def test_a_convolution_over_two_maps_needs_neither_enlarged_nor_joined_input(size):
    over_both = Convolution(nn.Conv2d(7, 6, 1), nn.BatchNorm2d(6).eval(), relu=True)
    x, skip = seeded(2, 4, 4, 3), seeded(2, 3, *size)
    x, skip = (one.contiguous(memory_format=torch.channels_last) for one in (x, skip))
    enlarged = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    want = over_both(torch.cat([enlarged, skip], dim=1).contiguous(memory_format=torch.channels_last))
    assert (want > 0).any()
    torch.testing.assert_close(Joined(over_both, 3)(x, skip), want)
