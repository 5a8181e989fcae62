"""The structured encoder without padding: the same parameters and the same numbers as `model.encoder`.

The hyper-tokens of a batch stand one after another in front of its local-tokens. Local-tokens stand
segment by segment, segments sorted by length, so that those of one length are a dense block: local
attention needs neither masks nor copies, and costs what the segments cost alone. On a GPU in half precision
it is one call of a kernel for ragged sequences (`model.ragged`) instead of one per length.

Shapes: B batch, N hyper-tokens of an example, M of the batch, L local-tokens of an example, P of the
batch, S segments that own local-tokens, D width, H heads. A group is (count, length): so many segments of
so many tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from model import ragged
from model.encoder import Encoder, EncoderLayer, StructuredAttention, masked_softmax, readable

LONG = 256  # keys from which on the fused kernel is the faster one on a CPU; in bfloat16 it never is
TILE = 128  # tokens that a kernel for ragged sequences takes at a time
LESS = 1 / 3  # of a projection's work, up to which it is better absorbed: small products are slower


class Picked(torch.autograd.Function):
    """Rows of (R, D) at distinct places, to which their gradients go; R, no row, may be there often, for any.

    The gradient of index_select is added up, row by row where places repeat, which costs a GPU far more.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(rows)
        return rows.index_select(0, places.clamp_max(len(rows) - 1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        rows = gradient.new_zeros(ctx.size + 1, gradient.shape[1]).index_copy_(0, places, gradient)
        return rows[: ctx.size], None


class Scores(torch.autograd.Function):
    """(.., Q, C) and (.., K, C) of one dtype to their products (.., Q, K).

    Both gradients are laid out as what they are of; that of a transposed matrix would have to be copied.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys)
        return queries @ keys.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        queries, keys = ctx.saved_tensors
        return gradient @ keys, gradient.mT @ queries


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """As `Scores`; under autocast `keys` may be tokens in float32."""
    scores: Tensor = Scores.apply(queries, keys.to(queries.dtype))
    return scores


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of a padded batch stand when packed."""

    hyper_at: Tensor  # (M,) flat places in (B, N)
    local_at: Tensor  # (P,) flat places in (B, L); B * L where a token is only there to fill up
    hyper_row: Tensor  # (B, N) packed places of hyper-tokens, 0 at padding
    hyper_mask: Tensor  # (B, N) bool
    private: Tensor | None
    reads: Tensor  # (B, N, N) bool: the hyper-tokens that a hyper-token, and its local-tokens, attend to
    segment: Tensor  # (B, L), -1 at padding
    owner: Tensor  # (S,) flat places in (B, N) of the hyper-tokens that own a segment
    groups: tuple[tuple[int, int], ...]
    multiple: int | None  # of local-tokens, where shapes are to be few

    @property
    def num_hyper(self) -> int:
        return len(self.hyper_at)

    @property
    def blocks(self) -> list[int]:
        """Local-tokens of each group."""
        return [count * length for count, length in self.groups]

    @cached_property
    def sequences(self) -> ragged.Sequences:
        """The local-tokens, segment by segment."""
        lengths = [length for count, length in self.groups for _ in range(count)]
        if self.multiple is not None:
            fill = len(self.local_at) - sum(lengths)
            lengths += [0] * (self.hyper_mask.numel() - len(lengths))
            lengths += [min(TILE, max(0, fill - begin)) for begin in range(0, self.multiple, TILE)]
        return ragged.Sequences.of(lengths, self.owner.device)

    @cached_property
    def owned(self) -> Tensor:
        """(B, N, L) bool: the local-tokens of a hyper-token."""
        slots = torch.arange(self.reads.shape[1], device=self.segment.device)
        return slots[:, None] == self.segment[:, None]

    @cached_property
    def read_by_local(self) -> Tensor:
        """(B, L, N) bool: the hyper-tokens that a local-token attends to; something also at padding."""
        owner = self.segment.clamp_min(0)[:, :, None].expand(-1, -1, self.reads.shape[1])
        return self.reads.gather(1, owner)

    def rows_of_local(self, local: Tensor) -> Tensor:
        """(P, D) to (B, L, D), zero at padding."""
        size, width = self.segment.numel(), local.shape[1]
        rows = local.new_zeros(size + 1, width).index_copy_(0, self.local_at, local)
        return rows[:size].unflatten(0, self.segment.shape)

    def of_local_rows(self, rows: Tensor) -> Tensor:
        """(B, L, D) to (P, D)."""
        picked: Tensor = Picked.apply(rows.flatten(0, 1), self.local_at)
        return picked

    def pack(self, hyper: Tensor, local: Tensor) -> Tensor:
        """(B, N, ...) and (B, L, ...) to (M + P, ...)."""
        return torch.cat([hyper.flatten(0, 1)[self.hyper_at], local.flatten(0, 1)[self.local_at]])

    def rows_of_hyper(self, packed: Tensor) -> Tensor:
        """(M, ...) to (B, N, ...); what stands at padding is finite and means nothing."""
        if self.num_hyper < self.hyper_row.numel():
            packed = packed.index_select(0, self.hyper_row.flatten())
        return packed.unflatten(0, self.hyper_row.shape)

    def of_rows(self, hyper: Tensor) -> Tensor:
        """(B, N, ...) to (M, ...)."""
        rows = hyper.flatten(0, 1)
        return rows if self.num_hyper == len(rows) else rows.index_select(0, self.hyper_at)

    def unpack(self, hyper: Tensor, local: Tensor, num_local: int | None = None) -> tuple[Tensor, Tensor]:
        """(M, D) and (P, D) to (B, N, D) and the first `num_local` of (B, L, D); what stands at padding is
        finite and means nothing."""
        return self.rows_of_hyper(hyper), self.rows_of_local(local)[:, :num_local].contiguous()


def pack(
    hyper_mask: Tensor, segment: Tensor, private: Tensor | None = None, multiple: int | None = None
) -> Packing:
    """The packing of a padded batch, (B, N) bool and (B, L) with -1 at padding; `private` as in `readable`.

    With `multiple`, for shapes that come again: hyper-tokens stay padded, local-tokens are filled up to it by
    some that nobody reads.

    Whoever owns local-tokens is no padding. Local-tokens of a segment keep their order.
    `segment = [[0, 2, 0, 0], [1, 1, 0, -1]]` has segments of 3, 1, 2 and 1 tokens, which stand as

        row 0 segment 2 | row 1 segment 0 | row 1 segment 1 | row 0 segment 0
             1          |        6        |      4  5       |     0  2  3        flat places in (B, L)

    and give the groups (2, 1), (1, 2), (1, 3).
    """
    batch, num_hyper = hyper_mask.shape
    base = torch.arange(batch, device=segment.device)[:, None] * num_hyper
    places = (segment >= 0).flatten().nonzero().flatten()
    owner = (segment + base).flatten()[places]  # of each local-token
    size = owner.bincount(minlength=batch * num_hyper)
    order = (size[owner] * size.numel() + owner).argsort(stable=True)
    owners = size.nonzero().flatten()
    owners = owners[size[owners].argsort(stable=True)]
    lengths, counts = size[owners].unique_consecutive(return_counts=True)
    hyper_at, local_at = hyper_mask.flatten().nonzero().flatten(), places[order]
    if multiple is not None:
        hyper_at = torch.arange(hyper_mask.numel(), device=segment.device)
        local_at = nn.functional.pad(local_at, (0, -len(local_at) % multiple), value=segment.numel())
    return Packing(
        hyper_at=hyper_at,
        local_at=local_at,
        hyper_row=inverse(hyper_at, hyper_mask.numel()).view_as(hyper_mask),
        hyper_mask=hyper_mask,
        private=private,
        # Padding reads itself, so that no softmax is over nothing.
        reads=readable(hyper_mask, private) | torch.eye(num_hyper, dtype=torch.bool, device=places.device),
        segment=segment,
        owner=owners,
        groups=tuple(zip(counts.tolist(), lengths.tolist(), strict=True)),
        multiple=multiple,
    )


def inverse(places: Tensor, size: int) -> Tensor:
    """`row` (size,) with `row[places[i]] = i`, and 0 elsewhere."""
    return places.new_zeros(size).index_copy(0, places, torch.arange(len(places), device=places.device))


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, dropout: nn.Dropout, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention of (.., Q, D/H) over (.., K, D/H); `mask` has no empty row."""
    fused = queries.is_cuda or (queries.dtype != torch.bfloat16 and keys.shape[-2] >= LONG)
    if fused and mask is None:
        rate = dropout.p if dropout.training else 0.0
        return nn.functional.scaled_dot_product_attention(queries, keys, values, dropout_p=rate)
    scores = products(queries, keys) / math.sqrt(queries.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return dropout(scores.softmax(dim=-1)) @ values


def project(x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """Several linear maps of the same tokens; on a GPU as one product, on a CPU that is no faster."""
    if not x.is_cuda:
        return tuple(layer(x) for layer in layers)
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return nn.functional.linear(x, weight, bias).chunk(len(layers), dim=-1)


def absorb(vectors: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
    """What scores tokens against `vectors` (S, H, D/H) when `layer` is not applied to the tokens.

    v_h (W_h x + b_h) = (W_h^T v_h) x + v_h b_h: the few vectors take the projection of the many tokens.
    Returns (S, H, D) and (S, H), divided by sqrt(D/H) as scores are.
    """
    vectors = vectors / math.sqrt(vectors.shape[-1])
    weight = layer.weight.unflatten(0, vectors.shape[1:])  # (H, D/H, D)
    bias = layer.bias.view(vectors.shape[1:])
    return (vectors.transpose(0, 1) @ weight).transpose(0, 1), (vectors * bias).sum(-1)


def packed_attention(
    attention: StructuredAttention, x: Tensor, packing: Packing, of_locals: "OfLocals"
) -> Tensor:
    """The four patterns over packed tokens, (M + P, D) to the same, before the output projection.

    `of_locals` is `by_length` or `at_once`.
    """
    heads, query, key, dropout = attention.num_heads, attention.query, attention.key, attention.dropout
    hyper, local = x.split([packing.num_hyper, len(x) - packing.num_hyper])

    # Of hyper-tokens what they need among themselves, what local-tokens read, and the query to local-tokens.
    of_hyper = project(hyper, query["h2h"], key["h2h"], attention.value_hyper, key["l2h"], query["h2l"])
    queries, keys, values, keys_for_local, asks = (
        packing.rows_of_hyper(part).unflatten(2, (heads, -1)) for part in of_hyper
    )  # (B, N, H, D/H)
    z_hyper = torch.zeros_like(queries)
    if "h2h" not in attention.without:
        q, k, v = (part.transpose(1, 2) for part in (queries, keys, values))
        z_hyper = attend(q, k, v, dropout, packing.reads[:, None]).transpose(1, 2)
    of_owners, z_local = of_locals(attention, local, (values, keys_for_local, asks), packing)
    return torch.cat([packing.of_rows(z_hyper.flatten(2) + of_owners), z_local])  # of (B, N, D) and (P, D)


OfHyper = tuple[Tensor, Tensor, Tensor]
OfLocals = Callable[[StructuredAttention, Tensor, OfHyper, Packing], tuple[Tensor, Tensor]]


def at_once(
    attention: StructuredAttention, local: Tensor, of_hyper: OfHyper, packing: Packing
) -> tuple[Tensor, Tensor]:
    """`by_length` on a GPU: one ragged call among local-tokens, example by example with hyper-tokens.

    The kernel for ragged sequences spends on few keys what it spends on many, and more still on gradients.
    """
    heads, query, key, dropout = attention.num_heads, attention.query, attention.key, attention.dropout
    values_hyper, keys_hyper, asks = of_hyper
    queries, keys, values = project(local, query["l2l"], key["l2l"], attention.value_local)
    z_local, z_hyper = torch.zeros_like(queries), torch.zeros_like(values_hyper).flatten(2)
    if len(local) and "l2l" not in attention.without:
        q, k, v = (part.unflatten(1, (heads, -1)) for part in (queries, keys, values))
        z_local = ragged.attend(q, k, v, packing.sequences, dropout.p * dropout.training).flatten(1)
    if len(local) and "l2h" not in attention.without:
        z_local = z_local + local_to_hyper(local, values_hyper, keys_hyper, query["l2h"], dropout, packing)
    if len(local) and "h2l" not in attention.without:
        z_hyper = hyper_to_local(local, values, asks, key["h2l"], dropout, packing)
    return z_hyper, z_local


def by_length(
    attention: StructuredAttention, local: Tensor, of_hyper: OfHyper, packing: Packing
) -> tuple[Tensor, Tensor]:
    """What hyper-tokens read of local-tokens, (B, N, D), and these of both kinds, (P, D).

    Args:
        local: (P, D).
        of_hyper: values and keys for local-tokens and queries to them, each (B, N, H, D/H).
    """
    heads, query, key, dropout = attention.num_heads, attention.query, attention.key, attention.dropout
    batch, num_hyper = packing.hyper_row.shape
    width, counts = local.shape[1], [count for count, _ in packing.groups]
    values_hyper, keys_hyper, asks = of_hyper
    asks = asks.flatten(0, 1).index_select(0, packing.owner)  # (S, H, D/H)
    reads = packing.reads.flatten(0, 1)[packing.owner][:, None, None]  # (S, 1, 1, N)
    absorbed, constant = absorb(asks, key["h2l"])
    maps = [query["l2l"], key["l2l"], attention.value_local]
    l2h = "l2h" not in attention.without
    work = batch * num_hyper * (width + packing.segment.shape[1] * heads)  # of absorbing, over D
    dense_l2h = l2h and work < LESS * len(local) * width and packing.private is None
    l2h_by_group = l2h and not dense_l2h
    of_local = project(local, *maps, *([query["l2h"]] if l2h_by_group else []))
    read: list[tuple[Tensor, ...]] = [()] * len(counts)
    if l2h_by_group:
        examples = packing.owner // num_hyper
        of_segment = (part.index_select(0, examples) for part in (keys_hyper, values_hyper))  # (S, N, H, D/H)
        read = list(zip(*(part.split(counts) for part in of_segment), strict=True))
    by_group = zip(*(part.split(packing.blocks) for part in (*of_local, local)), strict=True)
    gathered, z_local = [], []
    for (*parts, tokens), hypers, asked, offset, mask, (count, length) in zip(
        by_group,
        read,
        absorbed.split(counts),
        constant.split(counts),
        reads.split(counts),
        packing.groups,
        strict=True,
    ):
        queries, keys, values, *to_hyper = (
            part.view(count, length, heads, -1).transpose(1, 2) for part in parts
        )
        z = torch.zeros_like(queries)
        if "l2l" not in attention.without:
            z = attend(queries, keys, values, dropout)
        if to_hyper:
            keys_read, values_read = (part.transpose(1, 2) for part in hypers)
            z = z + attend(to_hyper[0], keys_read, values_read, dropout, mask)
        z_local.append(z.transpose(1, 2).reshape(count * length, -1))
        if "h2l" not in attention.without:
            scores = products(asked, tokens.view(count, length, -1)) + offset[:, :, None]  # (S, H, m)
            gathered.append((dropout(scores.softmax(-1))[:, :, None] @ values).flatten(1))  # (S, D)
    z_hyper = local.new_zeros(batch * num_hyper, width)
    if gathered:
        z_hyper = z_hyper.index_copy_(0, packing.owner, torch.cat(gathered).to(z_hyper.dtype))
    of_locals = torch.cat(z_local) if z_local else local
    if dense_l2h:
        of_locals = of_locals + local_to_hyper(
            local, values_hyper, keys_hyper, query["l2h"], dropout, packing
        )
    return z_hyper.unflatten(0, (batch, num_hyper)), of_locals


def local_to_hyper(
    local: Tensor, values: Tensor, keys: Tensor, query: Any, dropout: nn.Dropout, packing: Packing
) -> Tensor:
    """What local-tokens (P, D) read of the hyper-tokens' values and keys, twice (B, N, H, D/H); (P, D).

    Example by example, with the projection of the queries absorbed by the keys.
    """
    batch, num_hyper, heads, _ = keys.shape
    absorbed, constant = absorb(keys.flatten(0, 1), query)
    tokens = packing.rows_of_local(local)
    scores = products(absorbed.reshape(batch, num_hyper * heads, -1), tokens)  # (B, N * H, L)
    scores = (scores + constant.view(batch, -1, 1)).unflatten(1, (num_hyper, heads))
    weights = scores.masked_fill(~packing.read_by_local.mT[:, :, None], -math.inf).softmax(dim=1)
    z = dropout(weights).permute(0, 2, 3, 1) @ values.transpose(1, 2)  # (B, H, L, D/H)
    return packing.of_local_rows(z.transpose(1, 2).flatten(2))


def hyper_to_local(
    local: Tensor, values: Tensor, asks: Tensor, key: Any, dropout: nn.Dropout, packing: Packing
) -> Tensor:
    """What hyper-tokens that ask (B, N, H, D/H) read of their local-tokens (P, D), values (P, D); (B, N, D).

    Example by example, with the projection of the keys absorbed by the queries; zero where nothing is owned.
    """
    batch, num_hyper, heads, _ = asks.shape
    absorbed, constant = absorb(asks.flatten(0, 1), key)
    tokens = packing.rows_of_local(local)
    scores = products(absorbed.reshape(batch, num_hyper * heads, -1), tokens)  # (B, N * H, L)
    scores = (scores + constant.view(batch, -1, 1)).unflatten(1, (num_hyper, heads))
    weights = dropout(masked_softmax(scores, packing.owned[:, :, None])).transpose(1, 2)  # (B, H, N, L)
    read = packing.rows_of_local(values).unflatten(2, (heads, -1)).transpose(1, 2)  # (B, H, L, D/H)
    return (weights.to(read.dtype) @ read).transpose(1, 2).flatten(2)


# Once for all layers and numbers of tokens; attention has other shapes in each batch.
compiled_feed_forward = torch.compile(EncoderLayer.feed_forward, dynamic=True)


def packed_encoder(
    encoder: Encoder, hyper: Tensor, local: Tensor, packing: Packing, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(M, D) and (P, D), placed by `packing`, to the encoded of the same shapes.

    With `keep`, (M + P) bool, the last layer computes these tokens alone; the others are zero.
    """
    x = torch.cat([hyper, local])
    kept = None if keep is None else keep.nonzero().flatten()
    of_locals = at_once if ragged.fits(encoder.num_heads, x) else by_length
    feed_forward = compiled_feed_forward if encoder.compiled else EncoderLayer.feed_forward
    last = len(encoder.layers) - 1
    for index, layer in enumerate(encoder.layers):
        assert isinstance(layer, EncoderLayer)
        z = packed_attention(layer.attention, x, packing, of_locals)
        if kept is not None and index == last:
            x, z = x.index_select(0, kept), z.index_select(0, kept)
        x = feed_forward(layer, x, layer.attention.output(z))
    if kept is not None:
        x = x.new_zeros(len(hyper) + len(local), x.shape[1]).index_copy(0, kept, x)
    of_hyper, of_local = x.split([len(hyper), len(local)])  # two slices would have gradients as large as x
    return of_hyper, of_local
