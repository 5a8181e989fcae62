"""Local attention over packed tokens by CUDA's kernels for batches of ragged sequences.

`model.packed` goes length by length, some dozen small calls each; here it is one call, whatever the
lengths. Half precision only; the flash kernels know nothing else.

Legend: T tokens, S sequences of them, H heads, D width; a sequence's tokens stand one after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
MAX_WIDTH, MULTIPLE = 256, 8  # of a head
AMPERE = (8, 0)  # the oldest GPUs that have the kernels


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where each of S sequences begins among tokens that stand one after another."""

    begins: Tensor  # (S + 1,) int32, the last one is the number of tokens
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Sequences":
        begins = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(begins, max(lengths, default=0))


def fits(num_heads: int, x: Tensor) -> bool:
    """Whether these kernels can take `x`, (.., D), as it will be once projected."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < AMPERE:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    width = x.shape[-1] // num_heads
    return dtype in HALVES and width <= MAX_WIDTH and width % MULTIPLE == 0


def attend(queries: Tensor, keys: Tensor, values: Tensor, places: Sequences, dropout: float) -> Tensor:
    """Softmax attention among the tokens of each sequence, thrice (T, H, D/H) to the same.

    ATen's own name, because the public `varlen_attn` has no dropout.
    """
    output: Tensor = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        places.begins,
        places.begins,
        places.longest,
        places.longest,
        dropout,
        is_causal=False,
        return_debug_mask=False,
    )[0]
    return output
