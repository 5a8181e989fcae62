"""The CRF beside sums over all sequences, and tag schemes there and back."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.baselines.chain import (
    BIO,
    BIOE,
    decode_tags,
    encode_tags,
    log_partition,
    negative_log_likelihood,
    path_score,
    viterbi,
)


def slow_score(emissions, tags, transitions):
    """Of one row, written out."""
    tags_and_ends = [emissions.shape[1], *tags, emissions.shape[1] + 1]
    moved = sum(transitions[a, b] for a, b in itertools.pairwise(tags_and_ends))
    return moved + sum(emissions[i, tag] for i, tag in enumerate(tags))


@pytest.mark.parametrize("per_example", [False, True])
def test_it_equals_the_sum_and_the_best_of_all_sequences(per_example):
    torch.manual_seed(3)
    emissions = torch.randn(3, 4, 3, dtype=torch.float64)
    transitions = torch.randn((3, 5, 5) if per_example else (5, 5), dtype=torch.float64)
    lengths = (4, 1, 3)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    partition = log_partition(emissions, mask, transitions)
    paths, probabilities = viterbi(emissions, mask, transitions)
    for row, length in enumerate(lengths):
        own = transitions[row] if per_example else transitions
        scores = {
            tags: slow_score(emissions[row], tags, own) for tags in itertools.product(range(3), repeat=length)
        }
        whole = torch.stack(list(scores.values())).logsumexp(0)
        torch.testing.assert_close(partition[row], whole)
        best = max(scores, key=lambda tags: float(scores[tags]))
        assert paths[row] == list(best)
        assert probabilities[row] == pytest.approx(float((scores[best] - whole).exp()), abs=1e-5)
        tags = torch.tensor([[1, 2, 0, 1]])
        known = path_score(emissions[row : row + 1], tags, mask[row : row + 1], own)
        torch.testing.assert_close(known[0], scores[tuple(tags[0, :length].tolist())])


def test_the_loss_is_a_mean_over_tokens():
    emissions, transitions = torch.zeros(2, 3, 3), torch.zeros(5, 5)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss = negative_log_likelihood(emissions, torch.zeros(2, 3, dtype=torch.long), mask, transitions)
    torch.testing.assert_close(loss, torch.tensor(3.0).log())  # each of four tokens is one of three alike


@pytest.mark.parametrize(
    ("scheme", "tags"), [(BIO, "O B O B I O B I I"), (BIOE, "O B O B E O B I E")], ids=["BIO", "BIOE"]
)
def test_spans_become_tags(scheme, tags):
    numbers = encode_tags(9, [(1, 2), (3, 5), (6, 9)], scheme)
    assert [scheme[number] for number in numbers] == tags.split()


def test_of_overlapping_spans_the_longest_wins():
    assert encode_tags(4, [(0, 1), (0, 3), (2, 4)], BIO) == [1, 2, 2, 0]


@given(st.sets(st.integers(0, 12), max_size=8), st.sampled_from([BIO, BIOE]))
def test_spans_there_and_back(cuts, scheme):
    ordered = sorted(cuts)
    spans = list(zip(ordered[0::2], ordered[1::2], strict=False))
    assert decode_tags(encode_tags(12, spans, scheme), scheme) == spans


def test_what_no_encoding_gives_is_read_with_sense():
    assert decode_tags([2, 2, 0, 1, 1, 2], BIO) == [(3, 4), (4, 6)]  # a lone I is nothing, B after B is new
    assert decode_tags([3, 1, 2, 0, 1, 3, 3], BIOE) == [(1, 3), (4, 6)]
