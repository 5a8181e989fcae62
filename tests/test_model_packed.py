"""The packed encoder: where tokens stand, and that it computes what the reference computes."""

import contextlib
import copy
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import model.packed
from benchmarks.train import batch
from model import ragged, recorded
from model.encoder import Encoder, EncoderLayer, StructuredAttention
from model.network import Config, Network
from model.packed import LESS, LONG, TILE, pack, packed_encoder

SIZES = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "intermediate_size": 12, "dropout": 0.0}

# Per example, the number of local-tokens of each hyper-token; none is a modality that is empty.
batches = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=4)


def padded(batch: list[list[int]], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """hyper_mask (B, N) and segment (B, L); the local-tokens of a row stand in any order."""
    hyper_mask = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.bool)
    segment = torch.full((len(batch), max(map(sum, batch))), -1)
    for row, sizes in enumerate(batch):
        hyper_mask[row, : len(sizes)] = True
        own = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)], dtype=torch.long)
        segment[row, : len(own)] = own[torch.randperm(len(own), generator=generator)]
    return hyper_mask, segment


def test_the_packing_of_two_rows_is_this():
    hyper_mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    segment = torch.tensor([[0, 2, 0, 0], [1, 1, 0, -1]])  # hyper-token 1 of row 0 owns nothing
    packing = pack(hyper_mask, segment)
    assert packing.hyper_at.tolist() == [0, 1, 2, 3, 4]
    assert packing.hyper_row.tolist() == [[0, 1, 2], [3, 4, 0]]
    assert packing.local_at.tolist() == [1, 6, 4, 5, 0, 2, 3]
    assert packing.owner.tolist() == [2, 3, 4, 0]
    assert packing.groups == ((2, 1), (1, 2), (1, 3))
    assert packing.reads.int().tolist() == [
        [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]],  # padding reads itself
    ]


@settings(max_examples=150, deadline=None)
@given(
    batches,
    st.integers(0, 2**31),
    st.booleans(),
    st.sets(st.sampled_from(StructuredAttention.patterns)),
    st.booleans(),
    st.sampled_from(["by length", "absorbed", "ragged"]),
)
def test_outputs_and_gradients_are_those_of_the_reference(batch, seed, joint, without, shared, form):
    generator = torch.Generator().manual_seed(seed)
    hyper_mask, segment = padded(batch, generator)
    private = torch.rand(hyper_mask.shape, generator=generator) < 0.5 if joint else None
    torch.manual_seed(seed)
    encoder = Encoder(**SIZES, without=without, shared=shared).double()
    hyper = torch.randn(*hyper_mask.shape, 8, dtype=torch.float64, requires_grad=True)
    local = torch.randn(*segment.shape, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(hyper), torch.randn_like(local)
    packing = pack(hyper_mask, segment, private)

    def reference():
        return encoder(hyper, local, hyper_mask, segment, private)

    def packed():
        rows = hyper.flatten(0, 1)[packing.hyper_at], local.flatten(0, 1)[packing.local_at]
        less = mock.patch.object(model.packed, "LESS", math.inf if form == "absorbed" else 0)
        with ragged_kernels() if form == "ragged" else less:
            return packing.unpack(*packed_encoder(encoder, *rows, packing))

    found = []
    for way in (reference, packed):
        outputs = way()
        real = [outputs[0][hyper_mask], outputs[1][segment >= 0]]
        loss = (outputs[0] * weights[0])[hyper_mask].sum() + (outputs[1] * weights[1])[segment >= 0].sum()
        inputs = [hyper, local, *encoder.parameters()]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        found.append((*real, *gradients))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("less", [0, math.inf])  # what is absorbed where
@pytest.mark.parametrize("pattern", StructuredAttention.patterns)
def test_in_training_the_attention_of_each_pattern_is_dropped_out(pattern, less, monkeypatch):
    monkeypatch.setattr(model.packed, "LESS", less)
    torch.manual_seed(0)
    encoder = Encoder(**SIZES, without=set(StructuredAttention.patterns) - {pattern})
    for layer in encoder.layers:
        layer.attention.dropout.p = 0.5
    packing = pack(torch.ones(2, 3, dtype=torch.bool), torch.tensor([[0, 0, 1, 2], [0, 1, 1, 2]]))
    given = torch.randn(packing.num_hyper, 8), torch.randn(len(packing.local_at), 8)
    outputs = [packed_encoder(encoder, *given, packing) for _ in range(2)]
    differ = [not torch.equal(*two) for two in zip(*outputs, strict=True)]
    assert differ == [pattern.startswith("h"), pattern.startswith("l")]
    encoder.eval()
    torch.testing.assert_close(
        packed_encoder(encoder, *given, packing), packed_encoder(encoder, *given, packing)
    )


def slowly(queries, keys, values, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, **rest):
    """What ATen's `_flash_attention_forward` computes of ragged batches, sequence by sequence."""
    assert cum_seq_q.dtype == cum_seq_k.dtype == torch.int32
    assert (int(cum_seq_q[-1]), int(cum_seq_k[-1])) == (len(queries), len(keys))
    assert not is_causal
    assert max_q >= cum_seq_q.diff().max()
    assert max_k >= cum_seq_k.diff().max()
    parts = []
    for asks, reads in zip(
        cum_seq_q.unfold(0, 2, 1).tolist(), cum_seq_k.unfold(0, 2, 1).tolist(), strict=True
    ):
        assert reads[0] < reads[1]  # a softmax over nothing
        q, k, v = (
            of_all[slice(*place)].transpose(0, 1)
            for of_all, place in ((queries, asks), (keys, reads), (values, reads))
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        parts.append((torch.dropout(scores.softmax(-1), dropout_p, True) @ v).transpose(0, 1))
    return (torch.cat(parts),)


@contextlib.contextmanager
def ragged_kernels():
    """As if the encoder stood on a GPU: same calls, a slow kernel."""
    with (
        mock.patch.object(ragged, "fits", return_value=True),
        mock.patch.object(torch.ops.aten, "_flash_attention_forward", slowly),
    ):
        yield


@pytest.mark.parametrize("private", [None, torch.tensor([[True, False, False], [True, False, False]])])
def test_long_texts_take_other_kernels_to_the_same_numbers(private):
    torch.manual_seed(0)
    hyper_mask = torch.tensor([[True, True, True], [True, True, False]])
    segment = torch.arange(LONG + 20).expand(2, -1) // (LONG + 5)
    encoder = Encoder(**SIZES | {"hidden_size": 32}).double()
    hyper = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    local = torch.randn(2, LONG + 20, 32, dtype=torch.float64, requires_grad=True)
    packing = pack(hyper_mask, segment, private)
    assert packing.groups == ((2, 15), (2, LONG + 5))
    length, width, heads = LONG + 20, 32, encoder.layers[0].attention.num_heads
    assert 3 * (width + length * heads) < LESS * length * width  # so that L2H is absorbed
    rows = hyper.flatten(0, 1)[packing.hyper_at], local.flatten(0, 1)[packing.local_at]
    found = []
    for hypers, locals_ in (
        packing.unpack(*packed_encoder(encoder, *rows, packing)),
        encoder(hyper, local, hyper_mask, segment, private),
    ):
        loss = hypers[hyper_mask].pow(3).sum() + locals_.pow(3).sum()
        gradients = torch.autograd.grad(loss, [hyper, local, *encoder.parameters()])
        found.append((hypers[hyper_mask], locals_, *gradients))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_the_last_layer_may_leave_out_what_nobody_asks_for():
    generator = torch.Generator().manual_seed(0)
    hyper_mask, segment = padded([[2, 0, 3], [1, 4]], generator)
    packing = pack(hyper_mask, segment)
    torch.manual_seed(0)
    encoder, hyper, local = Encoder(**SIZES), torch.randn(5, 8), torch.randn(10, 8)
    keep = torch.arange(15) % 4 == 0
    whole = torch.cat(packed_encoder(encoder, hyper, local, packing))
    some = torch.cat(packed_encoder(encoder, hyper, local, packing, keep))
    torch.testing.assert_close(some[keep], whole[keep])
    assert not some[~keep].any()


def test_compiled_layers_give_the_same_and_are_compiled_once_for_all_lengths(monkeypatch):
    """By AOTAutograd without code generation: what is compiled when is decided before it."""
    feed_forward = torch.compile(EncoderLayer.feed_forward, dynamic=True, backend="aot_eager")
    called = mock.Mock(side_effect=feed_forward)
    monkeypatch.setattr(model.packed, "compiled_feed_forward", called)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    encoder = Encoder(**SIZES | {"num_layers": 3})
    compiled = copy.deepcopy(encoder)
    compiled.compiled = True
    batches = [[[2, 0, 3], [1, 4]], [[5, 5]], [[1], [2, 2, 2, 2], [0, 1]]]
    for number, counts in enumerate(batches):
        hyper_mask, segment = padded(counts, generator)
        packing = pack(hyper_mask, segment)
        hyper = torch.randn(packing.num_hyper, 8, generator=generator, requires_grad=True)
        local = torch.randn(len(packing.local_at), 8, generator=generator)
        found = []
        for one in (encoder, compiled):
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                encoded = torch.cat(packed_encoder(one, hyper, local, packing))
            found.append((encoded, *torch.autograd.grad(encoded.pow(2).sum(), [hyper, *one.parameters()])))
        torch.testing.assert_close(found[1], found[0])
    assert called.call_count == 3 * len(batches)


def densely(queries, keys, values, begins, _, max_q, max_k, dropout_p, **rest):
    """What `slowly` computes, without a look at numbers, so that it can be traced."""
    sequence = torch.bucketize(torch.arange(len(queries)), begins[1:], right=True)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(queries.shape[-1])
    scores = scores.masked_fill(sequence[:, None] != sequence, -math.inf)
    return (torch.einsum("hqk,khd->qhd", torch.dropout(scores.softmax(-1), dropout_p, True), values),)


def replayed(layers):
    """`layers` with the gradients of a CUDA graph: in memory of its own, which the next ones overwrite."""
    weights, memory = list(layers.parameters()), []

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            ctx.given = [x.detach().requires_grad_(x.requires_grad) for x in given[: -len(weights)]]
            with torch.enable_grad():
                ctx.output = layers(*ctx.given)
            return ctx.output.detach()

        @staticmethod
        def backward(ctx, gradient):
            inputs = [x for x in (*ctx.given, *weights) if x.requires_grad]
            gradients = iter(torch.autograd.grad(ctx.output, inputs, gradient, materialize_grads=True))
            found = [next(gradients) if x.requires_grad else None for x in (*ctx.given, *weights)]
            if not memory:
                memory.extend(None if x is None else torch.empty_like(x) for x in found)
            return tuple(
                None if x is None else kept.copy_(x).detach() for x, kept in zip(found, memory, strict=True)
            )

    return lambda *given: Replayed.apply(*given, *weights)


@pytest.fixture
def unrecorded(monkeypatch):
    """As if on a GPU that records, all but the recording, traced by AOTAutograd: the shapes asked for."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", densely)
    monkeypatch.setattr(recorded, "compiled", torch.compile(recorded.run, dynamic=True, backend="aot_eager"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    made = []

    def graphed(layers, sample, **options):
        made.append([tensor.shape for tensor in sample])
        return replayed(layers)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    return made


@pytest.mark.parametrize("joint", [False, True])
def test_batches_filled_up_for_recording_give_the_same_and_are_compiled_once(unrecorded, joint):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    encoder = Encoder(**SIZES).double()
    recordings = recorded.Recordings(encoder)
    batches = [
        [[2, 0, 3, 1, 1], [1, 4, 2]],
        [[5, 5, 1], [70, 260], [1, 2, 3]],
        [[1, 0, 3, 1, 1], [0, 4, 3]],  # of the first one's shape
    ]
    for number, counts in enumerate(batches):
        hyper_mask, segment = padded(counts, generator)
        hyper = torch.randn(*hyper_mask.shape, 8, dtype=torch.float64, requires_grad=True)
        local = torch.randn(*segment.shape, 8, dtype=torch.float64, requires_grad=True)
        private = torch.rand(hyper_mask.shape, generator=generator) < 0.5 if joint else None
        packing = pack(hyper_mask, segment, private, multiple=2 * TILE)
        num_local = len(packing.local_at)
        assert num_local % (2 * TILE) == 0
        assert packing.num_hyper == hyper_mask.numel()
        assert packing.sequences.begins[-1] == num_local
        assert len(packing.sequences.begins) == hyper_mask.numel() + 3
        rows = local.flatten(0, 1)[packing.local_at.clamp_max(segment.numel() - 1)]
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            got = packing.unpack(*recordings(hyper.flatten(0, 1), rows, packing))
        want = encoder(hyper, local, hyper_mask, segment, private)
        found = []
        for of_hyper, of_local in (got, want):
            real = of_hyper[hyper_mask], of_local[segment >= 0]
            loss = real[0].pow(3).sum() + real[1].pow(2).sum()
            found.append((*real, *torch.autograd.grad(loss, [hyper, local, *encoder.parameters()])))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert len(unrecorded) == 2


@pytest.mark.parametrize(("joint", "most"), [(False, 2), (True, 2), (False, 1)])
def test_a_network_that_records_trains_as_one_that_does_not(unrecorded, monkeypatch, joint, most):
    """Also where batches of one shape add up to a step, and where they come after the last recording."""
    monkeypatch.setattr(recorded, "MOST", most)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "encoder_layers": 2, "encoder_heads": 2}
    config = Config(**sizes, vocab_size=30522, decoder_layers=1, decoder_heads=2, dropout=0.0, joint=joint)
    batches = [batch(3, 300), batch(2, 90), batch(3, 300)]
    found = []
    for compiled in (False, True):
        monkeypatch.setattr(ragged, "fits", lambda heads, x, compiled=compiled: compiled)
        torch.manual_seed(0)
        network = Network(config).double().train()
        network.encoder.compiled = compiled
        for data in batches:
            network(**data)["loss"].backward()
        found.append({name: weight.grad for name, weight in network.named_parameters()})
    assert len(unrecorded) == most
    for *_, hyper_row, _, segment in unrecorded:
        assert (hyper_row[1] % recorded.HYPER, segment[1] % recorded.WIDE) == (0, 0)
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=0, atol=1e-8, msg=name)


def test_unpacking_fewer_local_tokens_gives_the_first_ones():
    packing = pack(torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1, 1, 0]]))
    local = torch.arange(3.0)[:, None]
    _, all_of_them = packing.unpack(torch.zeros(2, 1), local)
    assert all_of_them.flatten().tolist() == [1, 2, 0]
    _, first = packing.unpack(torch.zeros(2, 1), local, 2)
    assert first.flatten().tolist() == [1, 2]


@pytest.mark.parametrize("num_hyper", [1, 20])
def test_a_batch_without_any_local_token_is_encoded(num_hyper):
    torch.manual_seed(0)
    hyper_mask, segment = torch.ones(2, num_hyper, dtype=torch.bool), torch.full((2, 3), -1)
    encoder = Encoder(**SIZES)
    hyper = torch.randn(2, num_hyper, 8)
    packing = pack(hyper_mask, segment)
    got, _ = packed_encoder(encoder, hyper.flatten(0, 1), torch.zeros(0, 8), packing)
    want, _ = encoder(hyper, torch.zeros(2, 3, 8), hyper_mask, segment)
    torch.testing.assert_close(got, want.flatten(0, 1))


def test_ragged_kernels_are_called_once_a_layer_whatever_the_lengths():
    generator = torch.Generator().manual_seed(0)
    hyper_mask, segment = padded([[2, 0, 3], [1, 4], [7, 6, 5, 8]], generator)
    packing = pack(hyper_mask, segment)
    encoder = Encoder(**SIZES | {"num_layers": 1, "dropout": 0.25})
    hyper, local = torch.randn(packing.num_hyper, 8), torch.randn(len(packing.local_at), 8)
    with ragged_kernels(), mock.patch.object(ragged, "attend", side_effect=ragged.attend) as attend:
        packed_encoder(encoder, hyper, local, packing)
        assert [call.args[-1] for call in attend.call_args_list] == [0.25]
        encoder.eval()
        packed_encoder(encoder, hyper, local, packing)
        assert attend.call_args.args[-1] == 0


def test_the_kernel_that_is_called_exists_and_has_gradients():
    """On a GPU of which only shapes are computed, so that none is needed."""
    with FakeTensorMode():
        tokens = torch.randn(9, 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        sequences = ragged.Sequences(torch.zeros(4, dtype=torch.int32, device="cuda"), 5)
        output = ragged.attend(*tokens.unbind(1), sequences, 0.1)
        assert (output.shape, output.dtype, output.device.type) == ((9, 4, 64), torch.bfloat16, "cuda")
        assert type(output.grad_fn).__name__ == "FlashAttentionBackward0"


@pytest.mark.parametrize(
    ("device", "dtype", "heads", "capability", "fits"),
    [
        ("cuda", torch.bfloat16, 2, (8, 0), True),
        ("cuda", torch.bfloat16, 2, (7, 5), False),
        ("cuda", torch.float32, 2, (9, 0), False),
        ("cuda", torch.bfloat16, 16, (9, 0), False),  # heads of 4
        ("cpu", torch.bfloat16, 2, (9, 0), False),
    ],
)
def test_ragged_kernels_are_for_gpus_in_half_precision(device, dtype, heads, capability, fits, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    with FakeTensorMode():
        x = torch.zeros(3, 64, device=device, dtype=dtype)
    assert ragged.fits(heads, x) == fits
    monkeypatch.setattr("torch.is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr("torch.get_autocast_dtype", lambda device: torch.bfloat16)
    assert ragged.fits(heads, x) == (fits or dtype == torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("joint", [False, True])
def test_ragged_kernels_are_as_exact_as_what_goes_by_length_on_a_gpu(joint):
    generator = torch.Generator().manual_seed(0)
    hyper_mask, segment = padded([[2, 0, 3], [1, 4], [70, 6, 51, 8], [300, 200]], generator)
    private = hyper_mask & (torch.arange(4) == 0) if joint else None
    packing = pack(hyper_mask.cuda(), segment.cuda(), private.cuda() if joint else None)
    torch.manual_seed(0)
    encoder = Encoder(**SIZES | {"hidden_size": 128}).cuda()
    tokens = torch.randn(packing.num_hyper + len(packing.local_at), 128, device="cuda", requires_grad=True)
    weights = torch.randn_like(tokens)

    def run(encoder, tokens):
        parts = tokens.split([packing.num_hyper, len(packing.local_at)])
        output = torch.cat(packed_encoder(encoder, *parts, packing))
        return output, *torch.autograd.grad((output * weights).sum(), [tokens, *encoder.parameters()])

    want = run(copy.deepcopy(encoder).double(), tokens.double())
    errors = []
    for is_ragged in (False, True):
        with (
            mock.patch.object(ragged, "fits", return_value=is_ragged),
            torch.autocast("cuda", dtype=torch.bfloat16),
        ):
            got = run(encoder, tokens)
        errors.append([float((g - w).norm().detach()) for g, w in zip(got, want, strict=True)])
    for by_length, at_once, right in zip(*errors, want, strict=True):
        assert at_once < 2 * by_length + 1e-3
        assert at_once < 0.02 * float(right.norm()) + 0.1  # the gradient of a key's bias is zero


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_a_gpu_records_has_the_gradients_of_what_it_does_not():
    """Also where several batches of several shapes add up to one step."""
    batches = [
        {name: x.cuda() for name, x in batch(*size).items()} for size in ((4, 256), (3, 128), (4, 256))
    ]
    sizes = {"hidden_size": 128, "intermediate_size": 256, "encoder_layers": 2, "encoder_heads": 2}
    config = Config(**sizes, decoder_layers=1, decoder_heads=2, dropout=0.0)
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = Network(config).cuda().train()
        network.encoder.compiled = compiled
        for _ in range(3):
            network.zero_grad()
            for data in batches:
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = network(**data)["loss"]
                loss.backward()
        found.append({name: weight.grad for name, weight in network.named_parameters()})
    whole = sum(float(gradient.norm()) ** 2 for gradient in found[0].values()) ** 0.5
    for name, want in found[0].items():
        assert float((found[1][name] - want).norm()) < 0.05 * float(want.norm()) + 1e-3 * whole, name
