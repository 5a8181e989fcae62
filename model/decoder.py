"""The value decoder: a Transformer decoder over one memory token, with a copy mechanism (section 3.5).

Shapes: B batch, Y output tokens, T copyable text tokens, D width, V vocabulary, W beam width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.encoder import masked_softmax


class CopyDecoder(nn.Module):
    """States of the output tokens and, for each, where it would copy from and whether.

    The memory is the output of the Attribute hyper-token alone. The gate is that of See et al.
    (2017, equation 8), over the copied context, the state and the input's embedding; its sigmoid
    is the probability to generate from the vocabulary instead of copying.
    """

    def __init__(
        self, *, num_layers: int, hidden_size: int, num_heads: int, intermediate_size: int, dropout: float
    ) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(
            hidden_size, num_heads, intermediate_size, dropout, activation="gelu", batch_first=True
        )
        self.transformer = nn.TransformerDecoder(layer, num_layers)
        self.copy_query = nn.Linear(hidden_size, hidden_size)
        self.copy_key = nn.Linear(hidden_size, hidden_size)
        self.gate = nn.Linear(3 * hidden_size, 1)

    def forward(
        self, embedded: Tensor, memory: Tensor, text: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States (B, Y, D), copy weights (B, Y, T) and gate logits (B, Y).

        Args:
            embedded: (B, Y, D), the output so far, begin token first.
            memory: (B, 1, D).
            text: (B, T, D), encoded text tokens.
            text_mask: (B, T) bool, True where a token may be copied. Without any, the gate is shut.
        """
        causal = torch.ones(2 * embedded.shape[1:2], dtype=torch.bool, device=embedded.device).triu(1)
        states = self.transformer(embedded, memory, tgt_mask=causal)
        scores = self.copy_query(states) @ self.copy_key(text).transpose(1, 2)
        copy = masked_softmax(scores.float() / math.sqrt(text.shape[-1]), text_mask[:, None])
        context = copy.to(text.dtype) @ text
        gate = self.gate(torch.cat([context, states, embedded], dim=-1)).squeeze(-1).float()
        nothing_to_copy = ~text_mask.any(dim=1, keepdim=True)
        return states, copy, gate.masked_fill(nothing_to_copy, 30.0)


def log_copied(copy: Tensor, text_ids: Tensor, targets: Tensor) -> Tensor:
    """Log-probability that copying gives `targets` (B, Y), from weights (B, Y, T) and ids (B, T)."""
    matches = text_ids[:, None, :] == targets[:, :, None]
    return (copy * matches).sum(-1).clamp_min(torch.finfo(copy.dtype).tiny).log()


def mixture(vocabulary_log_probs: Tensor, copy: Tensor, gate: Tensor, text_ids: Tensor) -> Tensor:
    """Log-probabilities over the vocabulary, generated or copied: (B, V), (B, T), (B,), (B, T) to (B, V)."""
    copied = torch.zeros_like(vocabulary_log_probs).scatter_add(1, text_ids, copy)
    log_copy = copied.clamp_min(torch.finfo(copied.dtype).tiny).log()
    generate = nn.functional.logsigmoid(gate)[:, None]
    return torch.logaddexp(
        generate + vocabulary_log_probs, nn.functional.logsigmoid(-gate)[:, None] + log_copy
    )


def beam_search(
    step: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int,
    width: int,
    max_length: int,
    begin: int,
    end: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The `width` most probable outputs found, without length normalisation.

    Args:
        step: maps prefixes (B * W, t), which start with `begin`, and their rows (B * W,) in 0..B-1
            to next-token log-probabilities (B * W, V).
        max_length: tokens before the end token, which is forced after that many.

    Returns:
        tokens (B, W, max_length + 1), filled with `end` after the first one, and log-probabilities
        (B, W), best first; a hypothesis that does not exist has -inf.
    """
    rows = torch.arange(batch_size, device=device).repeat_interleave(width)
    prefixes = torch.full((batch_size, width, 1), begin, device=device)
    scores = torch.full((batch_size, width), -math.inf, device=device)
    scores[:, 0] = 0.0
    for position in range(max_length + 1):
        log_probs = step(prefixes.flatten(0, 1), rows).float().unflatten(0, (batch_size, width))
        if position == max_length:
            only_end = torch.full_like(log_probs, -math.inf)
            only_end[..., end] = log_probs[..., end]
            log_probs = only_end
        finished = (prefixes[..., 1:] == end).any(-1)  # (B, W)
        stay = torch.full_like(log_probs[0, 0], -math.inf)
        stay[end] = 0.0
        log_probs = torch.where(finished[..., None], stay, log_probs)
        vocabulary = log_probs.shape[-1]
        scores, best = (scores[..., None] + log_probs).flatten(1).topk(width, dim=1)
        parent, token = best // vocabulary, best % vocabulary
        prefixes = torch.cat(
            [prefixes.gather(1, parent[..., None].expand(-1, -1, position + 1)), token[..., None]], dim=-1
        )
        if (prefixes[..., 1:] == end).any(-1).all():
            break
    tokens = prefixes[..., 1:]
    missing = max_length + 1 - tokens.shape[-1]
    return nn.functional.pad(tokens, (0, missing), value=end), scores
