"""The value decoder: a Transformer decoder over one memory token, with a copy mechanism (section 3.5).

Shapes: B rows of the batch, A attributes asked of a row, Q questions (B, when one attribute is asked of each
row), Y output tokens, T text tokens, D width, V vocabulary, W beam width.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from model.encoder import masked_softmax


def precise(x: Tensor) -> Tensor:
    """`x` in float32 or better, for what goes into a logarithm."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class CopyDecoder(nn.Module):
    """States of the output tokens and, for each, where it would copy from and whether.

    The memory is the output of the Attribute hyper-token alone. The gate is that of See et al.
    (2017, equation 8), over the copied context, the state and the input's embedding; its sigmoid
    is the probability to generate from the vocabulary instead of copying.

    `view_size`: what is copied, and the gate, depend on a `View` too. The text does not know then what is
    asked, so the gate has to hear how well it fits, which the copy weights, whose sum is one, do not say: the
    mean of exp(score) over the text stands against generating, as in the sentinel of Merity et al. (2017).
    """

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        dropout: float,
        view_size: int | None = None,
    ) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(
            hidden_size, num_heads, intermediate_size, dropout, activation="gelu", batch_first=True
        )
        self.transformer = nn.TransformerDecoder(layer, num_layers)
        self.copy_query = nn.Linear(hidden_size, hidden_size)
        self.copy_key = nn.Linear(hidden_size, hidden_size)
        self.gate = nn.Linear(3 * hidden_size, 1)
        if view_size is not None:
            self.view_query = nn.Linear(hidden_size, view_size)
            self.view_gate = nn.Linear(view_size, 1, bias=False)

    def remember(
        self,
        memory: Tensor,
        text: Tensor,
        text_mask: Tensor,
        asked: Tensor | None = None,
        view: Tensor | None = None,
    ) -> "Memory":
        """What does not depend on the output.

        Attention over one token weighs it with 1 whatever the query is, so cross-attention is a constant of
        each layer.

        Args:
            memory: (Q, D).
            text, text_mask: (B, T, D) and (B, T), True where a token may be copied.
            asked: (B, A) bool, True at the Q questions in their order; absent when Q is B.
            view: (Q, T, R), with `view_size`.
        """
        constants = []
        for layer in self.layers:
            _, _, value = layer.multihead_attn.in_proj_weight.chunk(3)
            bias = layer.multihead_attn.in_proj_bias.chunk(3)[2]
            read = nn.functional.linear(memory, value, bias)
            constants.append(layer.multihead_attn.out_proj(read)[:, None])
        return Memory(constants, text, self.copy_key(text).transpose(1, 2), text_mask, asked, view)

    def forward(
        self, embedded: Tensor, memory: "Memory", past: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """States (Q, Y, D), copy weights (Q, Y, T), gate logits (Q, Y), and the `past` of the next tokens.

        Args:
            embedded: (Q, Y, D), the output so far, begin token first; with `past` one more token of each of
                Y hypotheses of the question.
            memory: of the Q questions. Where nothing may be copied, the gate is shut.
            past: keys and values of earlier tokens of each hypothesis, one (2, Q * Y, H, t, D/H) per layer.
        """
        x, present = embedded, []
        for index, layer in enumerate(self.layers):
            attended, kept = self_attention(layer.self_attn, x, past[index] if past is not None else None)
            present.append(kept)
            x = layer.norm1(x + layer.dropout1(attended))
            x = layer.norm2(x + layer.dropout2(memory.constants[index]))
            inner = layer.linear2(layer.dropout(nn.functional.gelu(layer.linear1(x))))
            x = layer.norm3(x + layer.dropout3(inner))
        queries = memory.by_row(self.copy_query(x))
        scores = precise(queries @ memory.keys) / math.sqrt(x.shape[-1])
        if memory.view is not None:
            of_view = self.view_query(x) @ memory.view.transpose(1, 2)  # (Q, Y, T)
            scores = scores + memory.by_row(precise(of_view)) / math.sqrt(memory.view.shape[-1])
        mask = memory.text_mask[:, None]
        weights = masked_softmax(scores, mask)  # (B, A * Y, T)
        context = memory.by_question(weights.to(memory.text.dtype) @ memory.text)
        copy = memory.by_question(weights)
        gate = precise(self.gate(torch.cat([context, x, embedded], dim=-1)).squeeze(-1))
        if memory.view is not None:
            seen = copy.to(memory.view.dtype) @ memory.view
            gate = gate + precise(self.view_gate(seen).squeeze(-1))
            gate = gate - memory.by_question(log_mean_exp(scores, mask)[..., None]).squeeze(-1)
        nothing_to_copy = ~memory.of_question(memory.text_mask.any(dim=1, keepdim=True))
        return x, copy, gate.masked_fill(nothing_to_copy, 30.0), present

    def no_past(self, num_hypotheses: int) -> list[Tensor]:
        """The `past` of hypotheses that have no token yet."""
        weight, heads = self.gate.weight, self.transformer.layers[0].self_attn.num_heads
        return [weight.new_zeros(2, num_hypotheses, heads, 0, self.copy_key.in_features // heads)] * len(
            self.transformer.layers
        )

    @property
    def layers(self) -> Iterable[nn.TransformerDecoderLayer]:
        return cast(Iterable[nn.TransformerDecoderLayer], self.transformer.layers)


class View(nn.Module):
    """R features of each token and question together, for text that does not know what is asked.

    h = GELU(U t + V a), of a token t and an encoded Attribute hyper-token a. Tags and copying both read them.
    """

    def __init__(self, *, hidden_size: int, view_size: int) -> None:
        super().__init__()
        self.text = nn.Linear(hidden_size, view_size)
        self.attribute = nn.Linear(hidden_size, view_size, bias=False)

    def forward(self, text: Tensor, attributes: Tensor, asked: Tensor) -> Tensor:
        """(B, T, D), (B, A, D) and the Q questions of (B, A) bool to (Q, T, R)."""
        both = self.text(text)[:, None] + self.attribute(attributes)[:, :, None]  # (B, A, T, R)
        return nn.functional.gelu(both[asked])


def log_mean_exp(scores: Tensor, mask: Tensor) -> Tensor:
    """log of the mean of exp over the last axis where `mask` is True; finite where it never is."""
    count = mask.sum(-1).clamp_min(1)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).logsumexp(-1) - count.log()


def self_attention(attention: nn.MultiheadAttention, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal attention of (B, Y, D) with the weights of `attention`; see `CopyDecoder.forward` for `past`."""
    heads = attention.num_heads
    projected = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    if past is None:
        queries, keys, values = projected.unflatten(-1, (3, heads, -1)).permute(
            2, 0, 3, 1, 4
        )  # (B, H, Y, D/H)
    else:
        new = (
            projected.flatten(0, 1).unflatten(-1, (3, heads, 1, -1)).transpose(0, 1)
        )  # (3, B * Y, H, 1, D/H)
        queries, (keys, values) = new[0], torch.cat([past, new[1:]], dim=3)
    dropout = attention.dropout if attention.training else 0.0
    z = nn.functional.scaled_dot_product_attention(
        queries, keys, values, dropout_p=dropout, is_causal=past is None
    )
    return attention.out_proj(z.transpose(1, 2).reshape(x.shape)), torch.stack([keys, values])


@dataclass(frozen=True, eq=False)
class Memory:
    """What the decoder reads, of B rows and Q questions; see `CopyDecoder.remember`."""

    constants: list[Tensor]  # per layer what cross-attention gives, (Q, 1, D)
    text: Tensor  # (B, T, D)
    keys: Tensor  # (B, D, T)
    text_mask: Tensor  # (B, T)
    asked: Tensor | None  # (B, A)
    view: Tensor | None  # (Q, T, R)

    def by_row(self, x: Tensor) -> Tensor:
        """(Q, Y, ...) to (B, A * Y, ...), zero where a row is asked less than A."""
        if self.asked is None:
            return x
        spread = x.new_zeros(*self.asked.shape, *x.shape[1:])
        spread[self.asked] = x
        return spread.flatten(1, 2)

    def by_question(self, x: Tensor) -> Tensor:
        """(B, A * Y, ...) to (Q, Y, ...)."""
        return x if self.asked is None else x.unflatten(1, (self.asked.shape[1], -1))[self.asked]

    def of_question(self, x: Tensor) -> Tensor:
        """(B, ...) to (Q, ...)."""
        return x if self.asked is None else x[self.asked.nonzero()[:, 0]]


def log_copied(copy: Tensor, text_ids: Tensor, targets: Tensor) -> Tensor:
    """Log-probability that copying gives `targets` (B, Y), from weights (B, Y, T) and ids (B, T)."""
    matches = text_ids[:, None, :] == targets[:, :, None]
    return (copy * matches).sum(-1).clamp_min(torch.finfo(copy.dtype).tiny).log()


def mixture(vocabulary_log_probs: Tensor, copied: Tensor, gate: Tensor, text_ids: Tensor) -> Tensor:
    """Log-probabilities over the vocabulary, generated or copied, (B, W, V).

    Args:
        vocabulary_log_probs: (B, W, V).
        copied: (B, W, T), for each text token the probability to copy its word, from wherever it stands.
        gate: (B, W) logits.
        text_ids: (B, T).
    """
    generated = vocabulary_log_probs + nn.functional.logsigmoid(gate)[..., None]
    log_copied = (
        copied.clamp_min(torch.finfo(copied.dtype).tiny).log() + nn.functional.logsigmoid(-gate)[..., None]
    )
    at = text_ids[:, None].expand_as(copied)
    return generated.scatter(-1, at, torch.logaddexp(generated.gather(-1, at), log_copied))


def beam_search(
    step: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int,
    width: int,
    max_length: int,
    begin: int,
    end: int,
    num_best: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The most probable outputs found, without length normalisation; those of transformers' beam search.

    `width` unfinished hypotheses go on beside the finished ones. An output is finished when its end token is
    among the `width` best continuations of the example.

    Args:
        step: maps the last tokens of the hypotheses (B, W), at first `begin`, and the hypothesis of the step
            before that each goes on from, as a row of (B * W) in (B, W), to next-token log-probabilities
            (B, W, V).
        max_length: tokens before the end token, which is forced after that many.
        num_best: how many outputs of each example are wanted, at most `width`, which is the default. The
            search ends when no unfinished hypothesis can become one of them.

    Returns:
        tokens (B, num_best, max_length + 1), filled with `end` after the first one, and log-probabilities
        (B, num_best), best first; a hypothesis that does not exist has -inf.
    """
    num_best = width if num_best is None else num_best
    first = torch.arange(batch_size, device=device)[:, None] * width  # of each example's rows
    last = torch.full((batch_size, width), begin, device=device)
    parent = torch.arange(width, device=device).expand(batch_size, width)
    scores = torch.full((batch_size, width), -math.inf, device=device)
    scores[:, 0] = 0.0
    tokens = torch.full((batch_size, width, max_length + 1), end, device=device)
    best_tokens, best_scores = tokens[:, :num_best], scores[:, :1].expand(-1, num_best) - math.inf
    for position in range(max_length + 1):
        log_probs = step(last, first + parent).float()
        ended = scores + log_probs[..., end]  # (B, W)
        candidates = [ended]
        if position < max_length:
            # The best of all are among the best of each; one of these may be the end token.
            likely, word = log_probs.topk(min(width + 1, log_probs.shape[-1]))
            goes_on = (scores[..., None] + likely.masked_fill(word == end, -math.inf)).flatten(1)
            scores, chosen = goes_on.topk(min(width, goes_on.shape[1]), dim=1)
            candidates.append(scores)
        least = torch.cat(candidates, dim=1).topk(width, dim=1).values[:, -1:]
        pool = torch.cat([best_scores, ended.masked_fill(ended < least, -math.inf)], dim=1)
        best_scores, kept = pool.topk(num_best, dim=1)
        best_tokens = torch.cat([best_tokens, tokens], dim=1).gather(
            1, kept[..., None].expand_as(best_tokens)
        )
        if position == max_length or (best_scores[:, -1] >= scores[:, 0]).all():
            break
        parent, last = chosen // likely.shape[-1], word.flatten(1).gather(1, chosen)
        tokens = tokens.gather(1, parent[..., None].expand_as(tokens))
        tokens[..., position] = last
    return best_tokens, best_scores
