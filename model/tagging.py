"""The auxiliary task: tags {B, I, O, E} over text tokens and a linear-chain CRF (appendix A).

A value of one token is B; of two or more, B (I...) E.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.crf import ScanCRF

TAGS = ("B", "I", "O", "E")
B, I, O, E = range(4)  # noqa: E741


def encode_tags(length: int, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Tags of `length` tokens for half-open token `spans`; where spans overlap, the longer one wins.

    Raises `ValueError` for an empty span or one out of range.
    """
    tags = [O] * length
    for begin, end in sorted(spans, key=lambda span: span[0] - span[1]):
        if not 0 <= begin < end <= length:
            raise ValueError(f"span [{begin}, {end}) does not lie within {length} tokens")
        if any(tag != O for tag in tags[begin:end]):
            continue
        tags[begin:end] = [B] if end - begin == 1 else [B, *[I] * (end - begin - 2), E]
    return tags


def decode_tags(tags: Sequence[int]) -> list[tuple[int, int]]:
    """The spans that `tags` spell; pieces that no encoding gives (a lone I or E) are not values."""
    spans, begin = [], None
    for position, tag in enumerate([*tags, O]):
        if begin is not None and tag == E:
            spans.append((begin, position + 1))
            begin = None
        elif tag == I:
            continue
        else:
            if begin is not None and position - begin == 1:
                spans.append((begin, position))
            begin = position if tag == B else None
    return spans


def batch_mean(total: Tensor, count: Tensor) -> Tensor:
    """`total` over `count`, and 0 of nothing."""
    return total / count.masked_fill(count == 0, 1)


def precise_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` in float32 or better, whatever precision `x` was made in."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), layer.weight.to(dtype), bias)


class Tagger(nn.Module):
    """Emissions and a CRF, one chain per text segment, so that a value never spans two.

    `view_size`: the states of the text do not know what is asked, and a `View` of both adds what does.
    """

    def __init__(self, *, hidden_size: int, view_size: int | None = None) -> None:
        super().__init__()
        self.emission = nn.Linear(hidden_size, len(TAGS))
        self.of_view = None if view_size is None else nn.Linear(view_size, len(TAGS), bias=False)
        self.crf = ScanCRF(len(TAGS))

    def emissions(self, states: Tensor) -> Tensor:
        """(..., D) to (..., C), in float32 or better, whatever precision the encoder ran in."""
        return precise_linear(self.emission, states)

    def emissions_of_view(self, view: Tensor) -> Tensor:
        """(..., R) to (..., C), what is added to the emissions of the text; as precise."""
        assert self.of_view is not None
        return precise_linear(self.of_view, view)

    def loss(self, emissions: Tensor, tags: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
        """Negative log-likelihood, a mean over valid tokens; never in less than float32.

        Args:
            emissions: (S, T, C), one row per segment and attribute.
            tags: (S, T).
            mask: (S, T) bool, a prefix of every row. Rows without tokens cost nothing.
            count: of tokens, where it is not that of `mask`.
        """
        # Nothing to learn from still has a gradient, zero, which several processes wait for.
        total = emissions.sum() * 0 + sum(weight.sum() * 0 for weight in self.crf.parameters())
        filled = mask[:, 0]
        count = mask.sum() if count is None else count
        # As if of one token where there is none: picking the others would wait for a GPU.
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)
        with torch.autocast(emissions.device.type, enabled=False):
            likelihood = self.crf.log_likelihood(emissions, tags, mask)
        return batch_mean(total - likelihood.masked_fill(~filled, 0).sum(), count)

    @torch.no_grad()
    def decode(self, emissions: Tensor, mask: Tensor) -> list[list[int]]:
        """Best tags of every row, (S, T, C) to S lists as long as the rows; empty rows give []."""
        rows = mask[:, 0]
        paths: list[list[int]] = [[] for _ in range(len(emissions))]
        if rows.any():
            best = self.crf.best_paths(emissions[rows], mask[rows])
            lengths = mask[rows].sum(1).tolist()
            for row, path, length in zip(
                rows.nonzero().flatten().tolist(), best.tolist(), lengths, strict=True
            ):
                paths[row] = path[:length]
        return paths
