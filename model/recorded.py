"""The encoder's layers in training on a GPU: compiled, recorded once for each shape and started together.

Of a step's thousands of kernels most take a host longer to start than a GPU to run. For few shapes, batches
are packed with `multiple`. Shapes as in `model.packed`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.encoder import Encoder, EncoderLayer
from model.packed import Packing, at_once, packed_attention
from model.ragged import Sequences

FILL = 2048  # local-tokens of a batch are a multiple of it,
WIDE = 256  # those of an example and the longest sequence of this,
HYPER = 4  # hyper-tokens of an example of this
MOST = 32  # recordings: each keeps the gradients of the encoder for itself


def run(layer: EncoderLayer, x: Tensor, packing: Packing) -> Tensor:
    """(M + P, D) to the same."""
    return layer.feed_forward(
        x, layer.attention.output(packed_attention(layer.attention, x, packing, at_once))
    )


def longest(packing: Packing) -> int:
    """Tokens of the longest segment, rounded up."""
    return -(-packing.sequences.longest // WIDE) * WIDE


compiled = torch.compile(run, dynamic=True)  # once for all layers


class Layers(nn.Module):
    """All layers as a function of tensors alone; `like` is any packing of these shapes."""

    def __init__(self, encoder: Encoder, like: Packing) -> None:
        super().__init__()
        self.encoder, self.like, self.longest = encoder, like, longest(like)

    def forward(
        self,
        x: Tensor,
        begins: Tensor,
        hyper_at: Tensor,
        local_at: Tensor,
        hyper_row: Tensor,
        reads: Tensor,
        segment: Tensor,
    ) -> Tensor:
        packing = replace(
            self.like, hyper_at=hyper_at, local_at=local_at, hyper_row=hyper_row, reads=reads, segment=segment
        )
        packing.__dict__["sequences"] = Sequences(begins, self.longest)
        _ = packing.owned, packing.read_by_local  # once for all layers
        for layer in self.encoder.layers:
            assert isinstance(layer, EncoderLayer)
            x = compiled(layer, x, packing)
        return x


class Recordings:
    """Of an encoder, by shape. What they compute with is one memory for all: one batch after another."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.by_shape = encoder, dict[object, Callable[..., Tensor]]()
        self.pool = torch.cuda.graph_pool_handle()
        for weight in encoder.parameters():  # else the next batch writes into the gradients of this one
            weight.register_hook(torch.clone)

    def __call__(self, hyper: Tensor, local: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """(M, D) and (P, D), placed by `packing`, to the encoded of the same shapes."""
        x = torch.cat([hyper, local])
        given = (
            *(x, packing.sequences.begins, packing.hyper_at, packing.local_at),
            *(packing.hyper_row, packing.reads, packing.segment),
        )
        shape = (longest(packing), *(tensor.shape for tensor in given))
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            layers = self.by_shape.get(shape) or Layers(self.encoder, packing)
            if shape not in self.by_shape and len(self.by_shape) < MOST:
                sample = tuple(
                    tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in given
                )
                record: Any = torch.cuda.make_graphed_callables
                layers = record(layers, sample, allow_unused_input=True, pool=self.pool)
                self.by_shape[shape] = layers
            x = layers(*given)
        return x[: packing.num_hyper], x[packing.num_hyper :]
