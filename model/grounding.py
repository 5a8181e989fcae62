"""Grounded outputs: each value is a run of tokens of one of the product's texts, or one that training knows.

The paper's decoder writes word by word and may change over from one source to another within a value, so
that what it says stands nowhere. Here beam search goes on only with tokens after which every value can still
become a grounded one. Scores stay the model's own: the probability of saying this, not its share of what is
allowed.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COMPLETE = -1  # as a key of a trie: a value may end here
BREAK = -2  # between two texts

Trie = Mapping[int, "Trie"]  # by the next token


def trie(values: Iterable[Sequence[int]]) -> Trie:
    """Of values as tokens, none of them empty."""
    root: dict[int, dict] = {}
    for value in values:
        node = root
        for token in value:
            node = node.setdefault(token, {})
        node[COMPLETE] = {}
    return root


@dataclass(frozen=True, slots=True)
class State:
    """Of an output that is not finished: how its last value may go on."""

    places: Sequence[int]  # in the texts, of the tokens that would go on
    node: Trie | None
    is_begun: bool = False
    is_first: bool = True


class Ground:
    """What one question's output may hold.

    Args:
        texts: tokens of the product's texts; a value lies within one.
        known: values of the attribute in training.
        end, separator: what ends an output, and what parts its values.
    """

    def __init__(self, texts: Iterable[Sequence[int]], known: Trie, *, end: int, separator: int) -> None:
        self.known, self.end, self.separator = known, end, separator
        parting = {end, separator}  # which a text holds where somebody wrote them
        written = (token for text in texts for token in (*text, BREAK))
        self.tokens = [BREAK if token in parting else token for token in written]
        self.after_one: dict[int, list[int]] = {}
        for place, token in enumerate(self.tokens):
            if token != BREAK:
                self.after_one.setdefault(token, []).append(place + 1)
        self.starts = sorted((self.after_one.keys() | known.keys()) - {COMPLETE})

    def begin(self) -> State:
        return State((), self.known)

    def after(self, state: State, token: int) -> State:
        if token == self.separator:
            return State((), self.known, is_first=False)
        places: Sequence[int] = self.after_one.get(token, ())
        if state.is_begun:
            places = [place + 1 for place in state.places if self.tokens[place] == token]
        node = None if state.node is None else state.node.get(token)
        return State(places, node, is_begun=True, is_first=state.is_first)

    def allowed(self, state: State) -> list[int]:
        """The tokens that may come next; nothing may after what is not grounded."""
        if not state.is_begun:
            return [*self.starts, self.end] if state.is_first else self.starts
        node = state.node or {}
        tokens = {self.tokens[place] for place in state.places} | set(node)
        if state.places or COMPLETE in node:
            tokens |= {self.end, self.separator}
        return sorted(tokens - {BREAK, COMPLETE})


def grounded(
    step: Callable[[Tensor, Tensor], Tensor], grounds: Sequence[Ground], width: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """A step of `beam_search` like `step`, with -inf for tokens that an example's ground does not allow.

    Args:
        step: (B, W) tokens and (B, W) parents to log-probabilities (B, W, V).
        grounds: of the B examples.
        width: W.
    """
    states: list[State] = []

    def next_token(tokens: Tensor, parents: Tensor) -> Tensor:
        nonlocal states
        if states:
            gone_on = zip(parents.flatten().tolist(), tokens.flatten().tolist(), strict=True)
            states = [
                grounds[row // width].after(states[parent], token)
                for row, (parent, token) in enumerate(gone_on)
            ]
        else:
            states = [ground.begin() for ground in grounds for _ in range(width)]
        log_probs = step(tokens, parents)
        allowed = [grounds[row // width].allowed(state) for row, state in enumerate(states)]
        rows = [row for row, ids in enumerate(allowed) for _ in ids]
        tokens_of = [token for ids in allowed for token in ids]
        at = tuple(torch.tensor([rows, tokens_of], dtype=torch.long, device=log_probs.device))
        of_row = log_probs.flatten(0, 1)
        return torch.full_like(of_row, -math.inf).index_put(at, of_row[at]).view_as(log_probs)

    return next_token
