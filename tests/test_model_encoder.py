"""The structured encoder: whole matrices of the masks, and attention computed token by token."""

import math

import pytest
import torch

from model.encoder import Encoder, StructuredAttention, masked_softmax, readable, structured_masks


def test_the_masks_of_a_batch_with_padding_and_an_empty_segment_are_these_matrices():
    hyper_mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    segment = torch.tensor([[0, 0, 2, -1], [1, 1, 1, 1]])  # hyper-token 1 of row 0, 0 of row 1 own nothing
    masks = structured_masks(hyper_mask, segment)
    assert masks.h2h.int().tolist() == [
        [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
        [[1, 1, 0], [1, 1, 0], [0, 0, 0]],
    ]
    assert masks.h2l.int().tolist() == [
        [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]],
        [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
    ]
    assert masks.l2h.int().tolist() == [
        [[1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 0]],
        [[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]],
    ]
    assert masks.l2l.int().tolist() == [
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
    ]


def test_the_masks_that_the_docstring_shows_are_these():
    masks = structured_masks(torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, 0, 1]]))
    shown = {"h2h": ["1 1", "1 1"], "h2l": ["1 1 0", "0 0 1"]}
    shown |= {"l2h": ["1 1", "1 1", "1 1"], "l2l": ["1 1 0", "1 1 0", "0 0 1"]}
    for name, rows in shown.items():
        assert [" ".join(map(str, row)) for row in getattr(masks, name)[0].int().tolist()] == rows
    lines = [line.split() for line in structured_masks.__doc__.splitlines()]
    for height in range(3):
        row = [word for rows in shown.values() for word in " ".join(rows[height : height + 1]).split()]
        assert any([word for word in line if word in ("0", "1")] == row for line in lines)


def test_private_hyper_tokens_are_read_by_themselves_and_their_own_local_tokens():
    hyper_mask, private = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, True, False]])
    assert readable(hyper_mask, private).int().tolist() == [[[1, 0, 1], [0, 1, 1], [0, 0, 1]]]
    masks = structured_masks(hyper_mask, torch.tensor([[0, 1, 2, 2]]), private)
    assert masks.l2h.int().tolist() == [[[1, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]]


def test_a_row_without_anything_to_attend_to_gives_zeros_and_finite_gradients():
    scores = torch.randn(2, 3, requires_grad=True)
    weights = masked_softmax(scores, torch.tensor([[True, True, False], [False, False, False]]))
    assert weights[0].sum().item() == pytest.approx(1)
    assert weights[0, 2] == 0
    assert weights[1].tolist() == [0, 0, 0]
    weights.pow(2).sum().backward()
    assert scores.grad.isfinite().all()


def attention_by_formula(layer, hyper, local, hyper_mask, segment):
    """Appendix A, one token, one head and one sum at a time."""
    heads, width = layer.num_heads, hyper.shape[-1] // layer.num_heads

    def attended(pattern, query, keys, values):
        if not keys:
            return torch.zeros(heads * width, dtype=query.dtype)
        parts = []
        for head in range(heads):
            at = slice(head * width, (head + 1) * width)
            q = layer.query[pattern](query)[at]
            e = [torch.dot(q, layer.key[pattern](key)[at]) / math.sqrt(width) for key in keys]
            total = sum(torch.exp(x) for x in e)
            parts.append(sum(torch.exp(x) / total * v[at] for x, v in zip(e, values, strict=True)))
        return torch.cat(parts)

    z_hyper, z_local = torch.zeros_like(hyper), torch.zeros_like(local)
    for b in range(len(hyper)):
        hypers = [i for i in range(hyper.shape[1]) if hyper_mask[b, i]]
        owned = {i: [j for j in range(local.shape[1]) if segment[b, j] == i] for i in hypers}
        xh, xl = hyper[b], local[b]
        vh, vl = layer.value_hyper(xh), layer.value_local(xl)
        for i in hypers:
            z = attended("h2h", xh[i], [xh[j] for j in hypers], [vh[j] for j in hypers])
            z = z + attended("h2l", xh[i], [xl[j] for j in owned[i]], [vl[j] for j in owned[i]])
            z_hyper[b, i] = layer.output(z)
            for j in owned[i]:
                z = attended("l2l", xl[j], [xl[k] for k in owned[i]], [vl[k] for k in owned[i]])
                z = z + attended("l2h", xl[j], [xh[k] for k in hypers], [vh[k] for k in hypers])
                z_local[b, j] = layer.output(z)
    return z_hyper, z_local


def test_structured_attention_equals_the_paper_formulas_token_by_token():
    torch.manual_seed(0)
    layer = StructuredAttention(hidden_size=8, num_heads=2, dropout=0.0).double()
    hyper, local = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    hyper_mask = torch.tensor([[True, True, True], [True, True, False]])
    segment = torch.tensor([[0, 0, 2, 2, 2], [1, 1, -1, -1, -1]])
    z_hyper, z_local = layer(hyper, local, structured_masks(hyper_mask, segment))
    want_hyper, want_local = attention_by_formula(layer, hyper, local, hyper_mask, segment)
    torch.testing.assert_close(z_hyper[hyper_mask], want_hyper[hyper_mask], rtol=0, atol=1e-12)
    torch.testing.assert_close(z_local[segment >= 0], want_local[segment >= 0], rtol=0, atol=1e-12)


def test_local_tokens_of_other_segments_reach_a_token_only_through_the_hyper_tokens():
    torch.manual_seed(0)
    sizes = {"num_heads": 2, "intermediate_size": 16, "dropout": 0.0, "hidden_size": 8}
    hyper, local = torch.randn(1, 2, 8), torch.randn(1, 4, 8)
    mask, segment = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, 0, 1, 1]])
    changed = local.clone()
    changed[0, 3] += 1.0
    for layers, reached in ((1, False), (2, True)):  # first into its own hyper-token, then to every local
        encoder = Encoder(num_layers=layers, **sizes).eval()
        before = encoder(hyper, local, mask, segment)[1][0, 0]
        after = encoder(hyper, changed, mask, segment)[1][0, 0]
        assert torch.allclose(before, after) != reached


def test_padding_changes_nothing():
    torch.manual_seed(0)
    encoder = Encoder(num_layers=2, hidden_size=8, num_heads=2, intermediate_size=16, dropout=0.0).double()
    hyper, local = torch.randn(1, 2, 8).double(), torch.randn(1, 3, 8).double()
    mask, segment = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, 1, 1]])
    alone = encoder(hyper, local, mask, segment)
    padded = encoder(
        torch.cat([hyper, torch.randn(1, 2, 8).double()], 1),
        torch.cat([local, torch.randn(1, 4, 8).double()], 1),
        torch.tensor([[True, True, False, False]]),
        torch.tensor([[0, 1, 1, -1, -1, -1, -1]]),
    )
    torch.testing.assert_close(padded[0][:, :2], alone[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(padded[1][:, :3], alone[1], rtol=0, atol=1e-12)


def test_a_pattern_left_out_adds_nothing_and_the_others_stay():
    torch.manual_seed(0)
    whole = StructuredAttention(hidden_size=8, num_heads=2, dropout=0.0)
    hyper, local = torch.randn(1, 2, 8), torch.randn(1, 3, 8)
    masks = structured_masks(torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, 0, 1]]))
    nothing = whole.output(torch.zeros(8))

    def outputs(*without):
        part = StructuredAttention(hidden_size=8, num_heads=2, dropout=0.0, without=without)
        part.load_state_dict(whole.state_dict())
        return part(hyper, local, masks)

    z_hyper, z_local = whole(hyper, local, masks)
    for pair, token_type, z in ((("h2h", "h2l"), 0, z_hyper), (("l2l", "l2h"), 1, z_local)):
        first, second = (outputs(pattern) for pattern in pair)
        torch.testing.assert_close(first[token_type] + second[token_type] - nothing, z)
        torch.testing.assert_close(outputs(*pair)[token_type], nothing.expand_as(z))
        torch.testing.assert_close(first[1 - token_type], (z_hyper, z_local)[1 - token_type])


def test_shared_queries_and_keys_are_one_matrix_each():
    attention = StructuredAttention(hidden_size=8, num_heads=2, dropout=0.0, shared=True)
    assert attention.query["h2h"] is attention.query["l2l"]
    assert attention.query["h2h"] is not attention.key["h2h"]
    matrices = sum(parameter.dim() == 2 for parameter in attention.parameters())
    assert matrices == 5  # Q, K, two V and the output, where otherwise there are eleven
