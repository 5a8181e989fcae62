"""Tag schemes and linear-chain CRFs, with one transition matrix for all or one per example.

Shapes: B batch, T tokens, K tags. A transition matrix is (K + 2, K + 2) or (B, K + 2, K + 2): rows are
where from, columns where to; row K is the start of a chain, column K + 1 its end. Masks are True where
a token is, a prefix of every row, and no row is empty.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BIO = ("O", "B", "I")
BIOE = ("O", "B", "I", "E")


def encode_tags(length: int, spans: Sequence[tuple[int, int]], scheme: Sequence[str]) -> list[int]:
    """Tags of `length` tokens for half-open spans; of overlapping ones the longest wins.

    In BIOE a value of one token is B, and of more B (I ...) E (AdaTag).
    """
    tags = [0] * length
    last = scheme.index("E") if "E" in scheme else scheme.index("I")
    for begin, end in sorted(spans, key=lambda span: (span[0] - span[1], span)):
        if any(tags[begin:end]):
            continue
        tags[begin:end] = [1] if end - begin == 1 else [1, *[2] * (end - begin - 2), last]
    return tags


def decode_tags(tags: Sequence[int], scheme: Sequence[str]) -> list[tuple[int, int]]:
    """The spans that tags spell: B opens one, everything else than I and E closes it."""
    spans, begin = [], None
    names = [scheme[tag] for tag in tags]
    for position, name in enumerate([*names, "O"]):
        if begin is not None and name in "OB":
            spans.append((begin, position))
            begin = None
        if name == "B":
            begin = position
        elif name == "E" and begin is not None:
            spans.append((begin, position + 1))
            begin = None
    return spans


def _parts(emissions: Tensor, transitions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Start (B, K), inner (B, K, K) and end (B, K) scores."""
    batch, _, tags = emissions.shape
    whole = transitions.expand(batch, tags + 2, tags + 2)
    return whole[:, tags, :tags], whole[:, :tags, :tags], whole[:, :tags, tags + 1]


def log_partition(emissions: Tensor, mask: Tensor, transitions: Tensor) -> Tensor:
    """(B,): the logarithm of the sum over all tag sequences, by the forward algorithm."""
    start, inner, end = _parts(emissions, transitions)
    alpha = start + emissions[:, 0]
    for step in range(1, emissions.shape[1]):
        following = (alpha[:, :, None] + inner).logsumexp(1) + emissions[:, step]
        alpha = torch.where(mask[:, step, None], following, alpha)
    return (alpha + end).logsumexp(1)


def path_score(emissions: Tensor, tags: Tensor, mask: Tensor, transitions: Tensor) -> Tensor:
    """(B,): the score of the given tags (B, T)."""
    start, inner, end = _parts(emissions, transitions)
    rows = torch.arange(len(tags), device=tags.device)
    score = (emissions.gather(2, tags[..., None]).squeeze(2) * mask).sum(1)
    steps = inner[rows[:, None], tags[:, :-1], tags[:, 1:]]  # (B, T - 1)
    score = score + (steps * mask[:, 1:]).sum(1)
    last = tags.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
    return score + start[rows, tags[:, 0]] + end[rows, last]


def negative_log_likelihood(emissions: Tensor, tags: Tensor, mask: Tensor, transitions: Tensor) -> Tensor:
    """The mean over tokens of -log p(tags), in float32."""
    emissions, transitions = emissions.float(), transitions.float()
    lost = log_partition(emissions, mask, transitions) - path_score(emissions, tags, mask, transitions)
    return lost.sum() / mask.sum()


@torch.no_grad()
def viterbi(emissions: Tensor, mask: Tensor, transitions: Tensor) -> tuple[list[list[int]], list[float]]:
    """The best tags of every row, as long as the row, and their probabilities."""
    emissions, transitions = emissions.float(), transitions.float()
    start, inner, end = _parts(emissions, transitions)
    best = start + emissions[:, 0]
    stay = torch.arange(best.shape[1], device=best.device).expand_as(best)
    came_from = []
    for step in range(1, emissions.shape[1]):
        following, parent = (best[:, :, None] + inner).max(1)
        best = torch.where(mask[:, step, None], following + emissions[:, step], best)
        came_from.append(torch.where(mask[:, step, None], parent, stay))
    score, tag = (best + end).max(1)
    path = [tag]
    for parent in reversed(came_from):
        tag = parent.gather(1, tag[:, None]).squeeze(1)
        path.append(tag)
    tags = torch.stack(path[::-1], 1).tolist()
    probability = (score - log_partition(emissions, mask, transitions)).exp().clamp(max=1.0).tolist()
    lengths = mask.sum(1).tolist()
    return [row[:length] for row, length in zip(tags, lengths, strict=True)], probability
