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


class Tagger(nn.Module):
    """Emissions and a CRF, one chain per text segment, so that a value never spans two."""

    def __init__(self, *, hidden_size: int) -> None:
        super().__init__()
        self.emission = nn.Linear(hidden_size, len(TAGS))
        self.crf = ScanCRF(len(TAGS))

    def loss(self, states: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """Negative log-likelihood, a mean over valid tokens, in float32.

        Args:
            states: (S, T, D), one row per segment.
            tags: (S, T).
            mask: (S, T) bool, a prefix of every row. Rows without tokens are left out.
        """
        rows = mask[:, 0]
        if not rows.any():
            return states.sum() * 0.0
        mask = mask[rows]
        with torch.autocast(states.device.type, enabled=False):
            log_likelihood = self.crf.log_likelihood(self.emissions(states[rows]), tags[rows], mask)
        return -log_likelihood.sum() / mask.sum()

    def emissions(self, states: Tensor) -> Tensor:
        """(..., D) to (..., C), in float32 or better, whatever precision the encoder ran in."""
        weight, bias = self.emission.weight, self.emission.bias
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return nn.functional.linear(states.to(dtype), weight.to(dtype), bias.to(dtype))

    @torch.no_grad()
    def decode(self, states: Tensor, mask: Tensor) -> list[list[int]]:
        """Best tags of every row, (S, T, D) to S lists as long as the rows; empty rows give []."""
        rows = mask[:, 0]
        paths: list[list[int]] = [[] for _ in range(len(states))]
        if rows.any():
            best = self.crf.best_paths(self.emissions(states[rows]), mask[rows])
            lengths = mask[rows].sum(1).tolist()
            for row, path, length in zip(
                rows.nonzero().flatten().tolist(), best.tolist(), lengths, strict=True
            ):
                paths[row] = path[:length]
        return paths
