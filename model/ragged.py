"""Attention over packed tokens by CUDA's kernels for batches of ragged sequences.

`model.packed` goes length by length, some dozen small calls each; here each pattern is one call,
whatever the lengths. Half precision only; the flash kernels know nothing else.

Legend: T tokens, S sequences of them, H heads, D width; a sequence's tokens stand one after another.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.encoder import StructuredAttention

HALVES = (torch.float16, torch.bfloat16)
MAX_WIDTH, MULTIPLE = 256, 8  # of a head
AMPERE = (8, 0)  # the oldest GPUs that have the kernels


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where each of S sequences begins among tokens that stand one after another."""

    begins: Tensor  # (S + 1,) int32, the last one is the number of tokens
    longest: int

    @classmethod
    def of(cls, lengths: Tensor) -> "Sequences":
        """(S,) lengths."""
        begins = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(begins, int(lengths.max()) if len(lengths) else 0)

    @classmethod
    def single(cls, tokens: Tensor) -> "Sequences":
        """Each token of (T, ..) for itself; asks nothing of a GPU that the host would wait for."""
        return cls(torch.arange(len(tokens) + 1, dtype=torch.int32, device=tokens.device), 1)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Tokens that are read by several: `rows` of them, each sequence what one query reads."""

    rows: Tensor  # (T,)
    sequences: Sequences

    @classmethod
    def of(cls, reads: Tensor, rows: Tensor) -> "Gathered":
        """(S, N) bool, who of N is read, and where each of these stands, (S, N)."""
        return cls(rows[reads], Sequences.of(reads.sum(1)))


def fits(attention: "StructuredAttention", x: Tensor) -> bool:
    """Whether these kernels can take `x`, (T, D), as it will be once projected."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < AMPERE:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    width = x.shape[1] // attention.num_heads
    return dtype in HALVES and width <= MAX_WIDTH and width % MULTIPLE == 0


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, of_queries: Sequences, of_keys: Sequences, dropout: float
) -> Tensor:
    """Softmax attention, each sequence of queries (T, H, D/H) over its sequence of keys; (T, H, D/H).

    ATen's own name, because the public `varlen_attn` has no dropout.
    """
    output: Tensor = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        of_queries.begins,
        of_keys.begins,
        of_queries.longest,
        of_keys.longest,
        dropout,
        is_causal=False,
        return_debug_mask=False,
    )[0]
    return output
