"""Outputs whose values stand in a text or are known: every one of these can be said, and nothing else."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_decoder import BEGIN, END, VOCABULARY, exhaustive, over_prefixes, table

from model.decoder import beam_search
from model.grounding import Ground, grounded, trie

SEPARATOR = 0
WORDS = [token for token in range(VOCABULARY) if token not in (END, SEPARATOR)]
runs = st.lists(st.sampled_from(WORDS), max_size=4)
written = st.lists(st.integers(0, VOCABULARY - 1), max_size=4)  # a text may hold "[SEP]", which is a token


def sayable(ground, length):
    """All outputs of at most `length` tokens that go on and end as `ground` allows."""
    found, going_on = set(), [((), ground.begin())]
    for _ in range(length + 1):
        nexts = []
        for output, state in going_on:
            for token in ground.allowed(state):
                if token == END:
                    found.add(output)
                else:
                    nexts.append(((*output, token), ground.after(state, token)))
        going_on = nexts
    return found


def right(output, texts, known):
    if not output:
        return True
    values, value = [], []
    for token in (*output, SEPARATOR):
        if token == SEPARATOR:
            values.append(value)
            value = []
        else:
            value.append(token)
    stands = [text[i:j] for text in texts for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
    return all(value in stands or value in known for value in values)


@settings(max_examples=60, deadline=None)
@given(st.lists(written, max_size=3), st.lists(runs.filter(bool), max_size=3))
def test_exactly_the_grounded_outputs_can_be_said(texts, known):
    ground = Ground(texts, trie(known), end=END, separator=SEPARATOR)
    every = itertools.chain.from_iterable(
        itertools.product([*WORDS, SEPARATOR], repeat=length) for length in range(6)
    )
    assert sayable(ground, 5) == {output for output in every if right(output, texts, known)}


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_best_grounded_outputs(seed):
    first, second = WORDS[:2]
    cases = [([[first, second, first]], [[second, second]]), ([], [[first]]), ([[second], [first]], [])]
    models = [table(seed), table(seed + 10), table(seed + 20)]
    grounds = [Ground(texts, trie(known), end=END, separator=SEPARATOR) for texts, known in cases]
    tokens, scores = beam_search(
        grounded(over_prefixes(models), grounds, 60),
        batch_size=3,
        width=60,
        max_length=3,
        begin=BEGIN,
        end=END,
    )
    for row, (texts, known) in enumerate(cases):
        want = [
            (score, output) for score, output in exhaustive(models[row], 3) if right(output, texts, known)
        ]
        found = [
            (score, output[: output.index(END)])
            for score, output in zip(scores[row].tolist(), tokens[row].tolist(), strict=True)
            if score > -math.inf
        ]
        assert [output for _, output in found] == [output for _, output in want]
        torch.testing.assert_close([score for score, _ in found], [score for score, _ in want])


def test_where_nothing_can_be_said_nothing_is_said():
    ground = Ground([], trie([]), end=END, separator=SEPARATOR)
    tokens, scores = beam_search(
        grounded(over_prefixes([table(0)]), [ground], 2),
        batch_size=1,
        width=2,
        max_length=3,
        begin=BEGIN,
        end=END,
        num_best=1,
    )
    assert tokens.tolist() == [[[END] * 4]]
    assert scores[0, 0] == pytest.approx(table(0)([BEGIN])[END].item())
