"""Copying, mixing and beam search, against brute force on tiny vocabularies."""

import itertools
import math

import pytest
import torch
import transformers

from model.decoder import CopyDecoder, beam_search, log_copied, log_mean_exp, mixture


def test_the_mixture_is_a_distribution_and_agrees_with_the_training_likelihood():
    torch.manual_seed(0)
    vocabulary = torch.randn(2, 6).log_softmax(-1)
    copy, gate = torch.randn(2, 4).softmax(-1), torch.randn(2)
    ids = torch.tensor([[0, 3, 3, 5], [1, 1, 1, 2]])
    same = (ids[:, :, None] == ids[:, None, :]).float()
    mixed = mixture(vocabulary[:, None], copy[:, None] @ same, gate[:, None], ids).squeeze(1)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(2))
    for target in range(6):
        wanted = torch.full((2, 1), target)
        by_hand = torch.sigmoid(gate) * vocabulary[:, target].exp()
        by_hand = by_hand + (1 - torch.sigmoid(gate)) * (copy * (ids == target)).sum(-1)
        torch.testing.assert_close(mixed[:, target].exp(), by_hand)
        copied = log_copied(copy[:, None], ids, wanted).squeeze(1).exp()
        torch.testing.assert_close(copied, (copy * (ids == target)).sum(-1), atol=1e-30, rtol=1e-5)


def test_without_text_to_copy_the_gate_is_shut():
    decoder = CopyDecoder(num_layers=1, hidden_size=8, num_heads=2, intermediate_size=16, dropout=0.0).eval()
    mask = torch.tensor([[False, False], [True, False]])
    memory = decoder.remember(torch.randn(2, 8), torch.randn(2, 2, 8), mask)
    _, copy, gate, _ = decoder(torch.randn(2, 3, 8), memory)
    assert (1 - gate[0].sigmoid()).max() < 1e-6
    assert copy[0].abs().sum() == 0
    assert copy[1].tolist() == [[1, 0]] * 3


def test_with_a_view_the_gate_hears_how_well_the_text_fits():
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 16, "dropout": 0.0}
    decoder = CopyDecoder(**sizes, view_size=4).double()
    torch.nn.init.zeros_(decoder.view_gate.weight)
    one, text, embedded = (torch.randn(2, *shape).double() for shape in ((8,), (5, 8), (3, 8)))
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    asked = torch.ones(2, 1, dtype=torch.bool)

    def read(view):
        return decoder(embedded, decoder.remember(one, text, mask, asked, view))

    states, copy, gate, _ = read(torch.zeros(2, 5, 4).double())
    _, same_copy, other_gate, _ = read(torch.ones(2, 5, 4).double())  # every token fits better, by as much
    better = decoder.view_query(states).sum(-1) / 2
    torch.testing.assert_close(same_copy, copy, rtol=0, atol=1e-12)
    torch.testing.assert_close(other_gate, gate - better, rtol=0, atol=1e-12)


def test_a_mean_of_exp_is_over_what_is_there_and_finite_where_nothing_is():
    scores = torch.tensor([[1.0, 2.0, 900.0], [5.0, 5.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    got = log_mean_exp(scores, mask)
    expected = (torch.tensor([1.0, 2.0]).exp().sum() / 2).log()
    torch.testing.assert_close(got[0], expected)
    assert got.isfinite().all()
    (gradient,) = torch.autograd.grad(got.sum(), scores)
    torch.testing.assert_close(
        gradient, torch.tensor([[1.0, 2.0, -torch.inf], [-torch.inf] * 3]).softmax(-1).nan_to_num(0)
    )


def test_the_gate_reads_what_is_copied_the_state_and_the_input_and_attention_is_dropped_out():
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 16, "dropout": 0.0}
    decoder = CopyDecoder(**sizes)
    text, embedded = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    memory = decoder.remember(torch.randn(2, 8), text, torch.ones(2, 5, dtype=torch.bool))
    states, copy, gate, _ = decoder(embedded, memory)
    expected = decoder.gate(torch.cat([copy @ text, states, embedded], -1)).squeeze(-1)
    torch.testing.assert_close(gate, expected)

    (layer,) = decoder.layers
    layer.self_attn.dropout = 0.5
    assert not torch.equal(decoder(embedded, memory)[0], decoder(embedded, memory)[0])
    decoder.eval()
    torch.testing.assert_close(decoder(embedded, memory)[0], states)


def test_an_output_token_never_sees_those_after_it():
    torch.manual_seed(0)
    decoder = CopyDecoder(num_layers=2, hidden_size=8, num_heads=2, intermediate_size=16, dropout=0.0).eval()
    embedded = torch.randn(1, 4, 8)
    memory = decoder.remember(torch.randn(1, 8), torch.randn(1, 2, 8), torch.ones(1, 2, dtype=torch.bool))
    changed = embedded.clone()
    changed[:, 2] += 1
    before, after = decoder(embedded, memory)[0], decoder(changed, memory)[0]
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2:], after[:, 2:])


def test_the_states_are_those_of_torch_s_decoder_over_one_memory_token():
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "intermediate_size": 16, "dropout": 0.0}
    decoder = CopyDecoder(**sizes).double()
    embedded, one = torch.randn(3, 4, 8).double(), torch.randn(3, 8).double()
    text, mask = torch.randn(3, 2, 8).double(), torch.ones(3, 2, dtype=torch.bool)
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    want = decoder.transformer(embedded, one[:, None], tgt_mask=causal)
    got, *_ = decoder(embedded, decoder.remember(one, text, mask))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weights = torch.randn_like(want)
    ours, theirs = (
        torch.autograd.grad(
            (x * weights).sum(),
            list(decoder.transformer.parameters()),
            allow_unused=True,
            materialize_grads=True,
        )
        for x in (got, want)
    )
    for one_of_ours, one_of_theirs in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one_of_ours, one_of_theirs, rtol=0, atol=1e-12)


def test_token_by_token_with_a_past_gives_what_all_at_once_gives():
    torch.manual_seed(0)
    decoder = CopyDecoder(
        num_layers=2, hidden_size=8, num_heads=2, intermediate_size=16, dropout=0.0
    ).double()
    hypotheses = torch.randn(2, 3, 4, 8).double()  # of two examples three hypotheses of four tokens
    one, text = torch.randn(2, 8).double(), torch.randn(2, 5, 8).double()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    memory, past = decoder.remember(one, text, mask), decoder.no_past(6)
    for token in range(4):
        *got, past = decoder(hypotheses[:, :, token], memory, past)
        for hypothesis in range(3):
            *want, _ = decoder(hypotheses[:, hypothesis, : token + 1], memory)
            for ours, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(ours[:, hypothesis], theirs[:, -1], rtol=0, atol=1e-12)


VOCABULARY, END, BEGIN = 4, 3, 9


def table(seed):
    """A language model over 4 tokens that depends on the whole prefix."""

    def log_probs(prefix):
        generator = torch.Generator().manual_seed(seed + hash(tuple(prefix)) % 100_003)
        return torch.randn(VOCABULARY, generator=generator).mul(2).log_softmax(0)

    return log_probs


def over_prefixes(models):
    """The step of a beam search over models of whole prefixes, one per example."""
    known = None

    def step(tokens, parents):
        nonlocal known
        before = [known[i] if known else [] for i in parents.flatten().tolist()]
        known = [[*prefix, token] for prefix, token in zip(before, tokens.flatten().tolist(), strict=True)]
        width = tokens.shape[1]
        rows = [models[i // width](prefix) for i, prefix in enumerate(known)]
        return torch.stack(rows).unflatten(0, tokens.shape)

    return step


def exhaustive(model, max_length):
    """Every output with its log-probability, best first."""
    found = []
    for length in range(max_length + 1):
        for tokens in itertools.product([t for t in range(VOCABULARY) if t != END], repeat=length):
            prefix, total = [BEGIN], 0.0
            for token in (*tokens, END):
                total += model(prefix)[token].item()
                prefix.append(token)
            found.append((total, list(tokens)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_as_wide_as_the_space_finds_what_exhaustive_search_finds(seed):
    model = table(seed)
    wanted = exhaustive(model, 3)
    tokens, scores = beam_search(
        over_prefixes([model]),
        batch_size=1,
        width=120,
        num_best=40,
        max_length=3,
        begin=BEGIN,
        end=END,
    )
    assert len(wanted) == 40
    for (score, output), found, found_score in zip(
        wanted, tokens[0].tolist(), scores[0].tolist(), strict=True
    ):
        assert found[: found.index(END)] == output
        assert found_score == pytest.approx(score, abs=1e-5)


class Scores(transformers.PreTrainedModel, transformers.GenerationMixin):
    """What `transformers` can generate from: log-probabilities of `table` models, chosen by begin token."""

    config_class = transformers.PretrainedConfig

    def __init__(self, models):
        super().__init__(
            transformers.PretrainedConfig(vocab_size=BEGIN + len(models), is_encoder_decoder=False)
        )
        self.models, self.unused = models, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, **kwargs):
        rows = [self.models[tokens[0] - BEGIN]([BEGIN, *tokens[1:]]) for tokens in input_ids.tolist()]
        logits = torch.full((len(rows), 1, self.config.vocab_size), -math.inf)
        logits[:, 0, :VOCABULARY] = torch.stack(rows)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}


def ending(model):
    """Ends for certain after five tokens: a forced end costs nothing in transformers, here its own price."""
    certain = torch.full((VOCABULARY,), -math.inf).index_fill(0, torch.tensor(END), 0.0)
    return lambda prefix: certain if len(prefix) > 5 else model(prefix)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_beams_are_those_of_transformers_on_the_same_scores(width):
    models = [ending(table(seed)) for seed in range(20, 26)]
    tokens, scores = beam_search(
        over_prefixes(models), batch_size=6, width=width, max_length=5, begin=BEGIN, end=END
    )
    theirs = Scores(models).generate(
        BEGIN + torch.arange(6)[:, None],
        num_beams=width,
        num_return_sequences=width,
        max_length=7,
        eos_token_id=END,
        pad_token_id=END,
        length_penalty=0.0,
        do_sample=False,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    want = torch.nn.functional.pad(theirs.sequences[:, 1:], (0, 7 - theirs.sequences.shape[1]), value=END)
    assert tokens.flatten(0, 1).tolist() == want.tolist()
    if width > 1:
        torch.testing.assert_close(scores.flatten(), theirs.sequences_scores)
    best, _ = beam_search(
        over_prefixes(models), batch_size=6, width=width, max_length=5, begin=BEGIN, end=END, num_best=1
    )
    assert best[:, 0].tolist() == tokens[:, 0].tolist()


def test_a_beam_of_one_is_greedy_and_rows_of_a_batch_do_not_mix():
    models = [table(1), table(2), table(3)]
    together = beam_search(
        over_prefixes(models),
        batch_size=3,
        width=1,
        max_length=4,
        begin=BEGIN,
        end=END,
    )
    for row, model in enumerate(models):
        prefix, total = [BEGIN], 0.0
        while prefix[-1] != END:
            log_probs = model(prefix)
            token = END if len(prefix) == 5 else int(log_probs.argmax())
            total += log_probs[token].item()
            prefix.append(token)
        assert together[0][row, 0].tolist()[: len(prefix) - 1] == prefix[1:]
        assert together[1][row, 0].item() == pytest.approx(total, abs=1e-5)


def test_hypotheses_that_do_not_exist_score_minus_infinity():
    certain = torch.tensor([-math.inf, -math.inf, -math.inf, 0.0])
    tokens, scores = beam_search(
        lambda tokens, parents: certain.repeat(*tokens.shape, 1),
        batch_size=1,
        width=3,
        max_length=2,
        begin=BEGIN,
        end=END,
    )
    assert scores[0].tolist() == [0.0, -math.inf, -math.inf]
    assert tokens[0, 0].tolist() == [END, END, END]
