"""The structured encoder of SMARTAVE (section 3.4, appendix A), in reference form.

It follows the paper's formulas and spends what a dense layer spends; `model.packed` computes the
same from the same parameters without padding, and is what runs.

Shapes: B batch, N hyper-tokens, L local-tokens, D width, H heads.
Masks are boolean, True where attention is allowed. `segment[b, l]` is the hyper-token that
local-token `l` belongs to, -1 where `l` is padding; `hyper_mask[b, n]` is False at padding.
Padding comes last in both.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.pretrained import take


@dataclass(frozen=True)
class Masks:
    """Who attends to whom, one matrix per pattern."""

    h2h: Tensor  # (B, N, N)
    h2l: Tensor  # (B, N, L)
    l2h: Tensor  # (B, L, N)
    l2l: Tensor  # (B, L, L)


def readable(hyper_mask: Tensor, private: Tensor | None = None) -> Tensor:
    """Which hyper-tokens a hyper-token, and the local-tokens it owns, attend to: (B, N, N).

    All of the example's in the paper. `private` ones (B, N) are read by themselves and their own local-tokens
    alone: of three hyper-tokens, the first two of them private,

        1 0 1
        0 1 1
        0 0 1
    """
    pairs = hyper_mask[:, :, None] & hyper_mask[:, None, :]
    if private is None:
        return pairs
    itself = torch.eye(hyper_mask.shape[1], dtype=torch.bool, device=hyper_mask.device)
    return pairs & (itself | ~private[:, None, :])


def structured_masks(hyper_mask: Tensor, segment: Tensor, private: Tensor | None = None) -> Masks:
    """The four attention patterns as pure functions of the ids.

    Two hyper-tokens, three local-tokens of which the first two belong to hyper-token 0 and
    the last to hyper-token 1 (`segment = [0, 0, 1]`) give

        h2h = 1 1    h2l = 1 1 0    l2h = 1 1    l2l = 1 1 0
              1 1          0 0 1          1 1          1 1 0
                                          1 1          0 0 1

    A hyper-token without local-tokens has an empty row in `h2l`; its output there is zero.

    Args:
        hyper_mask: (B, N) bool.
        segment: (B, L) int, -1 at padding.
        private: (B, N) bool, see `readable`.
    """
    num_hyper = hyper_mask.shape[1]
    local_mask = segment >= 0  # (B, L)
    owner = torch.arange(num_hyper, device=segment.device)[:, None] == segment[:, None, :]  # (B, N, L)
    h2h = readable(hyper_mask, private)
    of_owner = h2h.gather(1, segment.clamp_min(0)[:, :, None].expand(-1, -1, num_hyper))  # (B, L, N)
    return Masks(
        h2h=h2h,
        h2l=hyper_mask[:, :, None] & owner,
        l2h=local_mask[:, :, None] & of_owner,
        l2l=(segment[:, :, None] == segment[:, None, :]) & local_mask[:, :, None],
    )


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis where `mask` is True; rows without any True are zero."""
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights * mask


class Shared(nn.ModuleDict):
    """One module under every name."""

    def __getitem__(self, name: str) -> nn.Module:
        return super().__getitem__("shared")


class StructuredAttention(nn.Module):
    """Four attention patterns with their own Q and K, values shared per token type.

    z_H = A_H2H (X_H W_V^H) + A_H2L (X_L W_V^L)
    z_L = A_L2L (X_L W_V^L) + A_L2H (X_H W_V^H)

    Each A is a softmax of its own (section 3.4); the paper's sqrt(d) is per head here. For the paper's
    ablations, patterns in `without` are left out (Figure 4), and with `shared` all have one Q and one K
    ("12L-share" in Table 3).
    """

    patterns = ("h2h", "h2l", "l2h", "l2l")

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        dropout: float,
        without: Collection[str] = (),
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.without = num_heads, frozenset(without)

        def maps() -> nn.ModuleDict:
            if shared:
                return Shared({"shared": nn.Linear(hidden_size, hidden_size)})
            return nn.ModuleDict({p: nn.Linear(hidden_size, hidden_size) for p in self.patterns})

        self.query, self.key = maps(), maps()
        self.value_hyper = nn.Linear(hidden_size, hidden_size)
        self.value_local = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D/H)

    def _attend(self, pattern: str, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        if pattern in self.without:
            return torch.zeros_like(queries)
        q = self._split(self.query[pattern](queries))
        k = self._split(self.key[pattern](keys))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = self.dropout(masked_softmax(scores, mask[:, None]))
        return (weights @ values).transpose(1, 2).flatten(2)  # (B, T, D)

    def forward(self, hyper: Tensor, local: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """(B, N, D) and (B, L, D) to the same shapes, before residual and LayerNorm."""
        value_hyper = self._split(self.value_hyper(hyper))
        value_local = self._split(self.value_local(local))
        z_hyper = self._attend("h2h", hyper, hyper, value_hyper, masks.h2h) + self._attend(
            "h2l", hyper, local, value_local, masks.h2l
        )
        z_local = self._attend("l2l", local, local, value_local, masks.l2l) + self._attend(
            "l2h", local, hyper, value_hyper, masks.l2h
        )
        return self.output(z_hyper), self.output(z_local)


class EncoderLayer(nn.Module):
    """Structured attention, then a feed-forward network; residual and LayerNorm after each, as in BERT."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        dropout: float,
        without: Collection[str] = (),
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.attention = StructuredAttention(
            hidden_size=hidden_size, num_heads=num_heads, dropout=dropout, without=without, shared=shared
        )
        self.attention_norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.intermediate = nn.Linear(hidden_size, intermediate_size)
        self.output = nn.Linear(intermediate_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def start_from(self, theirs: Mapping[str, nn.Module], patterns: Collection[str]) -> None:
        """Take a pretrained layer, by the names of `model.pretrained`.

        Its Q and K go to each of `patterns`, its V to the tokens that these read.
        """
        attention = self.attention
        pairs = [
            (attention.output, "attention_output"),
            (self.attention_norm, "attention_norm"),
            (self.intermediate, "intermediate"),
            (self.output, "output"),
            (self.output_norm, "output_norm"),
        ]
        for pattern in patterns:
            values = attention.value_hyper if pattern.endswith("h") else attention.value_local
            pairs += [(attention.query[pattern], "query"), (attention.key[pattern], "key"), (values, "value")]
        for ours, name in pairs:
            take(ours, theirs[name])

    def feed_forward(self, x: Tensor, z: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(z))
        y = self.output(nn.functional.gelu(self.intermediate(x)))
        return self.output_norm(x + self.dropout(y))

    def forward(self, hyper: Tensor, local: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        z_hyper, z_local = self.attention(hyper, local, masks)
        return self.feed_forward(hyper, z_hyper), self.feed_forward(local, z_local)


class Encoder(nn.Module):
    """A stack of identical layers over the embedded hyper- and local-tokens."""

    compiled = False  # by model.packed, which runs it

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        dropout: float,
        without: Collection[str] = (),
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.layers = nn.ModuleList(
            EncoderLayer(
                hidden_size=hidden_size,
                num_heads=num_heads,
                intermediate_size=intermediate_size,
                dropout=dropout,
                without=without,
                shared=shared,
            )
            for _ in range(num_layers)
        )

    def start_from(self, layers: Sequence[Mapping[str, nn.Module]], patterns: Collection[str]) -> None:
        """Take pretrained layers, the first ones. Raises `ValueError` when there are too few."""
        if len(layers) < len(self.layers):
            raise ValueError(f"the checkpoint has {len(layers)} layers, encoder_layers is {len(self.layers)}")
        for ours, theirs in zip(self.layers, layers, strict=False):
            assert isinstance(ours, EncoderLayer)
            ours.start_from(theirs, patterns)

    def forward(
        self, hyper: Tensor, local: Tensor, hyper_mask: Tensor, segment: Tensor, private: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, D), (B, L, D), (B, N), (B, L), (B, N) to the encoded (B, N, D) and (B, L, D)."""
        masks = structured_masks(hyper_mask, segment, private)
        for layer in self.layers:
            hyper, local = layer(hyper, local, masks)
        return hyper, local
