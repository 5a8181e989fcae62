"""Tags {B, I, O, E} and the CRF."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.tagging import TAGS, B, E, I, O, Tagger, decode_tags, encode_tags


def test_one_token_is_b_and_longer_values_end_with_e():
    assert encode_tags(7, [(0, 1), (2, 4), (4, 7)]) == [B, O, B, E, B, I, E]


def test_of_overlapping_spans_the_longer_one_wins():
    assert encode_tags(4, [(0, 2), (1, 4)]) == [O, B, I, E]


@pytest.mark.parametrize("span", [(2, 2), (-1, 1), (3, 5), (3, 2)])
def test_a_span_that_is_empty_or_out_of_range_is_an_error(span):
    with pytest.raises(ValueError, match="does not lie within 4 tokens"):
        encode_tags(4, [span])


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), max_size=6))
def test_decoding_gives_back_the_spans_that_were_encoded(pieces):
    spans, at = [], 0
    for size, gap in pieces:
        spans.append((at, at + size))
        at += size + gap
    assert decode_tags(encode_tags(at, spans)) == spans


def test_pieces_that_no_encoding_gives_are_not_values():
    assert decode_tags([I, E, O, B, I, O, E, B, I]) == []


def test_the_loss_is_the_negative_log_likelihood_over_all_paths_per_token():
    torch.manual_seed(0)
    tagger = Tagger(hidden_size=3)
    states, tags = torch.randn(2, 3, 3), torch.tensor([[B, E, O], [B, O, O]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    emissions, crf = tagger.emission(states), tagger.crf

    def score(row, path):
        total = crf.start_transitions[path[0]] + crf.end_transitions[path[-1]]
        total = total + sum(emissions[row, i, tag] for i, tag in enumerate(path))
        return total + sum(crf.transitions[a, b] for a, b in itertools.pairwise(path))

    loss = 0.0
    for row, length in ((0, 3), (1, 1)):
        paths = itertools.product(range(len(TAGS)), repeat=length)
        partition = torch.logsumexp(torch.stack([score(row, path) for path in paths]), 0)
        loss = loss + partition - score(row, tags[row, :length].tolist())
    torch.testing.assert_close(tagger.loss(emissions, tags, mask), loss / 4)


def test_emissions_are_computed_in_float32_whatever_the_encoder_ran_in():
    torch.manual_seed(0)
    tagger = Tagger(hidden_size=48, view_size=48)
    states = torch.randn(2, 9, 48).bfloat16()
    for emissions in (tagger.emissions, tagger.emissions_of_view):
        with torch.autocast("cpu", torch.bfloat16):
            got = emissions(states)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, emissions(states.float()), rtol=0, atol=1e-5)


def test_segments_without_tokens_cost_nothing_and_break_nothing():
    tagger = Tagger(hidden_size=3)
    states = torch.randn(2, 4, 3, requires_grad=True)
    tags, nothing = torch.full((2, 4), O), torch.zeros(2, 4, dtype=torch.bool)
    loss = tagger.loss(tagger.emissions(states), tags, nothing)
    loss.backward()
    assert loss.item() == 0
    assert states.grad.abs().sum() == 0
    one = nothing.clone()
    one[1, :2] = True
    assert [len(path) for path in tagger.decode(tagger.emissions(states), one)] == [0, 2]
    emissions = tagger.emissions(states)
    torch.testing.assert_close(
        tagger.loss(emissions, tags, one), tagger.loss(emissions[1:], tags[1:], one[1:])
    )
