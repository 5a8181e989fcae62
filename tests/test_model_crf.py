"""The log-depth CRF, against torchcrf's loop over time and against all paths."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchcrf import CRF

from model.crf import ScanCRF

chains = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def batch(lengths, num_tags, seed):
    """A CRF with large random parameters, emissions, tags and mask."""
    torch.manual_seed(seed)
    crf = ScanCRF(num_tags).double()
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter, std=3)
    emissions = (3 * torch.randn(len(lengths), max(lengths), num_tags)).double().requires_grad_()
    tags = torch.randint(num_tags, emissions.shape[:2])
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return crf, emissions, tags, mask


def of_torchcrf(crf):
    """torchcrf's own with the very same parameters."""
    theirs = CRF(crf.num_tags, batch_first=True)
    for name, parameter in crf.named_parameters():
        setattr(theirs, name, parameter)
    return theirs


@settings(max_examples=60, deadline=None)
@given(chains, st.integers(1, 4), st.integers(0, 2**31))
def test_likelihoods_and_gradients_are_those_of_torchcrf(lengths, num_tags, seed):
    crf, emissions, tags, mask = batch(lengths, num_tags, seed)
    want = of_torchcrf(crf)(emissions, tags, mask, reduction="none")
    got = crf.log_likelihood(emissions, tags, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    weights = torch.randn_like(want)
    inputs = [emissions, *crf.parameters()]
    gradients = [torch.autograd.grad((x * weights).sum(), inputs, allow_unused=True) for x in (got, want)]
    for ours, theirs in zip(*gradients, strict=True):
        if theirs is None:  # transitions of chains of one token
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(chains, st.integers(1, 4), st.integers(0, 2**31))
def test_best_paths_are_those_of_torchcrf(lengths, num_tags, seed):
    crf, emissions, _, mask = batch(lengths, num_tags, seed)
    best = crf.best_paths(emissions, mask)
    want = of_torchcrf(crf).decode(emissions, mask)
    assert [path[:n] for path, n in zip(best.tolist(), lengths, strict=True)] == want
    assert not best[~mask].any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 2**31))
def test_sum_and_maximum_over_all_paths_of_small_chains(lengths, num_tags, seed):
    crf, emissions, tags, mask = batch(lengths, num_tags, seed)

    def score(chain, path):
        found = crf.start_transitions[path[0]] + crf.end_transitions[path[-1]]
        found = found + sum(emissions[chain, i, tag] for i, tag in enumerate(path))
        return (found + sum(crf.transitions[a, b] for a, b in itertools.pairwise(path))).item()

    paths, partitions = crf.best_paths(emissions, mask).tolist(), crf.log_partition(emissions, mask)
    given_scores = crf.path_score(emissions, tags, mask)
    for chain, length in enumerate(lengths):
        scores = {path: score(chain, path) for path in itertools.product(range(num_tags), repeat=length)}
        total = torch.tensor(list(scores.values()), dtype=torch.float64).logsumexp(0)
        torch.testing.assert_close(partitions[chain], total, rtol=0, atol=1e-10)
        assert scores[tuple(paths[chain][:length])] == pytest.approx(max(scores.values()), abs=1e-10)
        wanted = scores[tuple(tags[chain, :length].tolist())]
        assert given_scores[chain].item() == pytest.approx(wanted, abs=1e-10)


def test_parameters_are_drawn_as_by_torchcrf_and_can_be_exchanged_with_it():
    torch.manual_seed(0)
    theirs = CRF(4, batch_first=True)
    torch.manual_seed(0)
    ours = ScanCRF(4)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
