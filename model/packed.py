"""The structured encoder without padding: the same parameters and the same numbers as `model.encoder`.

The hyper-tokens of a batch stand one after another in front of its local-tokens. Local-tokens stand
segment by segment, segments sorted by length, so that those of one length are a dense block: local
attention needs neither masks nor copies, and costs what the segments cost alone. On a GPU in half precision
each pattern is one call of a kernel for ragged sequences (`model.ragged`) instead of one per length.

Shapes: B batch, N hyper-tokens of an example, M of the batch, L local-tokens of an example, P of the
batch, S segments that own local-tokens, D width, H heads. A group is (count, length): so many segments of
so many tokens.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from model import ragged
from model.encoder import Encoder, EncoderLayer, StructuredAttention, readable

LONG = 256  # keys from which on the fused kernel is the faster one on a CPU; in bfloat16 it never is
LESS = 1 / 3  # of a projection's work, up to which it is better absorbed: small products are slower


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of a padded batch stand when packed."""

    hyper_at: Tensor  # (M,) flat places in (B, N)
    local_at: Tensor  # (P,) flat places in (B, L)
    hyper_row: Tensor  # (B, N) packed places of hyper-tokens, 0 at padding
    local_row: Tensor  # (B, L) packed places of local-tokens, 0 at padding
    hyper_mask: Tensor  # (B, N) bool
    private: Tensor | None
    reads: Tensor  # (B, N, N) bool: the hyper-tokens that a hyper-token, and its local-tokens, attend to
    owner: Tensor  # (S,) flat places in (B, N) of the hyper-tokens that own a segment
    groups: tuple[tuple[int, int], ...]

    @property
    def num_hyper(self) -> int:
        return len(self.hyper_at)

    @property
    def blocks(self) -> list[int]:
        """Local-tokens of each group."""
        return [count * length for count, length in self.groups]

    @cached_property
    def segments(self) -> ragged.Sequences:
        """The local-tokens, segment by segment."""
        lengths = [length for count, length in self.groups for _ in range(count)]
        return ragged.Sequences.of(torch.tensor(lengths, dtype=torch.long, device=self.owner.device))

    def read_by(self, places: Tensor) -> ragged.Gathered:
        """The packed hyper-tokens that those at `places`, flat in (B, N), attend to."""
        num_hyper = self.hyper_row.shape[1]
        rows = self.hyper_row.index_select(0, places // num_hyper)
        return ragged.Gathered.of(self.reads.flatten(0, 1)[places], rows)

    @cached_property
    def read_by_hyper(self) -> ragged.Gathered:
        return self.read_by(self.hyper_at)

    @cached_property
    def read_by_owner(self) -> ragged.Gathered:
        return self.read_by(self.owner)

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
        row = self.local_row[:, :num_local]
        return self.rows_of_hyper(hyper), local.index_select(0, row.flatten()).unflatten(0, row.shape)


def pack(hyper_mask: Tensor, segment: Tensor, private: Tensor | None = None) -> Packing:
    """The packing of a padded batch, (B, N) bool and (B, L) with -1 at padding; `private` as in `readable`.

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
    return Packing(
        hyper_at=hyper_at,
        local_at=local_at,
        hyper_row=inverse(hyper_at, hyper_mask.numel()).view_as(hyper_mask),
        local_row=inverse(local_at, segment.numel()).view_as(segment),
        hyper_mask=hyper_mask,
        private=private,
        # Padding reads itself, so that no softmax is over nothing.
        reads=readable(hyper_mask, private) | torch.eye(num_hyper, dtype=torch.bool, device=places.device),
        owner=owners,
        groups=tuple(zip(counts.tolist(), lengths.tolist(), strict=True)),
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
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
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


def packed_attention(attention: StructuredAttention, x: Tensor, packing: Packing) -> Tensor:
    """The four patterns over packed tokens, (M + P, D) to the same, before the output projection."""
    if ragged.fits(attention, x):
        return ragged_attention(attention, x, packing)
    heads, query, key, dropout = attention.num_heads, attention.query, attention.key, attention.dropout
    hyper, local = x.split([packing.num_hyper, len(x) - packing.num_hyper])

    # Of hyper-tokens what they need among themselves, what local-tokens read, and the query to local-tokens.
    of_hyper = torch.stack(
        project(hyper, query["h2h"], key["h2h"], attention.value_hyper, key["l2h"], query["h2l"]), dim=1
    )
    batch, num_hyper = packing.hyper_row.shape
    dense = packing.rows_of_hyper(of_hyper).unflatten(3, (heads, -1))  # (B, N, 5, H, D/H)
    queries, keys, values = dense[:, :, :3].permute(2, 0, 3, 1, 4)  # (B, H, N, D/H)
    z_hyper = torch.zeros_like(queries)
    if "h2h" not in attention.without:
        z_hyper = attend(queries, keys, values, dropout, packing.reads[:, None])
    z_hyper = z_hyper.transpose(1, 2).reshape(batch * num_hyper, -1)

    counts = [count for count, _ in packing.groups]
    asks = dense[:, :, 4].flatten(0, 1).index_select(0, packing.owner)  # (S, H, D/H)
    reads = packing.reads.flatten(0, 1)[packing.owner][:, None, None]  # (S, 1, 1, N)
    absorbed, constant = absorb(asks, key["h2l"])
    maps = [query["l2l"], key["l2l"], attention.value_local]
    l2h = "l2h" not in attention.without
    work = batch * num_hyper * (x.shape[1] + packing.local_row.shape[1] * heads)  # of absorbing, over D
    dense_l2h = l2h and work < LESS * len(local) * x.shape[1] and packing.private is None
    l2h_by_group = l2h and not dense_l2h
    of_local = project(local, *maps, *([query["l2h"]] if l2h_by_group else []))
    read = [dense] * len(counts)
    if l2h_by_group:
        read = dense[:, :, 2:4].index_select(0, packing.owner // num_hyper).split(counts)  # (S, N, 2, H, D/H)
    by_group = zip(*(part.split(packing.blocks) for part in (*of_local, local)), strict=True)
    gathered, z_local = [], []
    for (*parts, tokens), of_hypers, asked, offset, mask, (count, length) in zip(
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
            values_of_hyper, keys_of_hyper = of_hypers.permute(2, 0, 3, 1, 4)
            z = z + attend(to_hyper[0], keys_of_hyper, values_of_hyper, dropout, mask)
        z_local.append(z.transpose(1, 2).reshape(count * length, -1))
        if "h2l" not in attention.without:
            scores = asked @ tokens.view(count, length, -1).transpose(1, 2) + offset[:, :, None]  # (S, H, m)
            gathered.append((dropout(scores.softmax(-1))[:, :, None] @ values).flatten(1))  # (S, D)
    if gathered:
        z_hyper = z_hyper.index_add(0, packing.owner, torch.cat(gathered))
    of_owners = torch.cat(z_local) if z_local else local
    if dense_l2h:
        values, keys = dense[:, :, 2:4].unbind(2)
        of_owners = of_owners + local_to_hyper(local, values, keys, query["l2h"], dropout, packing)
    return torch.cat([packing.of_rows(z_hyper.unflatten(0, (batch, num_hyper))), of_owners])


def ragged_attention(attention: StructuredAttention, x: Tensor, packing: Packing) -> Tensor:
    """`packed_attention` in one call for each pattern, whatever the lengths."""
    query, key, single = attention.query, attention.key, ragged.Sequences.single
    rate = attention.dropout.p * attention.training

    def projected(tokens: Tensor, *layers: Any) -> list[Tensor]:
        return [part.unflatten(1, (attention.num_heads, -1)) for part in project(tokens, *layers)]

    hyper, local = x.split([packing.num_hyper, len(x) - packing.num_hyper])
    of_h2h, read_h2h, values_hyper, read_l2h, of_h2l = projected(
        hyper, query["h2h"], key["h2h"], attention.value_hyper, key["l2h"], query["h2l"]
    )
    of_l2l, read_l2l, values_local, of_l2h, read_h2l = projected(
        local, query["l2l"], key["l2l"], attention.value_local, query["l2h"], key["h2l"]
    )
    z_hyper, z_local, segments = torch.zeros_like(of_h2h), torch.zeros_like(of_l2l), packing.segments
    if "h2h" not in attention.without:
        found, rows = packing.read_by_hyper, packing.read_by_hyper.rows
        z_hyper = ragged.attend(
            of_h2h, read_h2h[rows], values_hyper[rows], single(of_h2h), found.sequences, rate
        )
    if len(local) and "h2l" not in attention.without:
        owners = packing.hyper_row.flatten()[packing.owner]
        asking = of_h2l[owners]
        gathered = ragged.attend(asking, read_h2l, values_local, single(asking), segments, rate)
        z_hyper = z_hyper.index_add(0, owners, gathered)
    if len(local) and "l2l" not in attention.without:
        z_local = ragged.attend(of_l2l, read_l2l, values_local, segments, segments, rate)
    if len(local) and "l2h" not in attention.without:
        found, rows = packing.read_by_owner, packing.read_by_owner.rows
        z_local = z_local + ragged.attend(
            of_l2h, read_l2h[rows], values_hyper[rows], segments, found.sequences, rate
        )
    return torch.cat([z_hyper, z_local]).flatten(1)


def local_to_hyper(
    local: Tensor, values: Tensor, keys: Tensor, query: Any, dropout: nn.Dropout, packing: Packing
) -> Tensor:
    """What local-tokens (P, D) read of the hyper-tokens' values and keys, twice (B, N, H, D/H); (P, D).

    Example by example, with the projection of the queries absorbed by the keys.
    """
    batch, num_hyper, heads, _ = keys.shape
    padded = local.index_select(0, packing.local_row.flatten()).view(batch, -1, local.shape[1])
    absorbed, constant = absorb(keys.flatten(0, 1), query)
    scores = padded @ absorbed.reshape(batch, num_hyper * heads, -1).transpose(1, 2)  # (B, L, N * H)
    scores = (scores + constant.view(batch, 1, -1)).unflatten(2, (num_hyper, heads))
    weights = scores.masked_fill(~packing.hyper_mask[:, None, :, None], -math.inf).softmax(dim=2)
    z = dropout(weights).permute(0, 3, 1, 2) @ values.transpose(1, 2)  # (B, H, L, D/H)
    return z.transpose(1, 2).reshape(-1, local.shape[1]).index_select(0, packing.local_at)


def packed_encoder(
    encoder: Encoder, hyper: Tensor, local: Tensor, packing: Packing, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(M, D) and (P, D), placed by `packing`, to the encoded of the same shapes.

    With `keep`, (M + P) bool, the last layer computes these tokens alone; the others are zero.
    """
    x = torch.cat([hyper, local])
    last = len(encoder.layers) - 1
    for index, layer in enumerate(encoder.layers):
        assert isinstance(layer, EncoderLayer)
        z = packed_attention(layer.attention, x, packing)
        if keep is not None and index == last:
            kept = keep.nonzero().flatten()
            x, z = x.index_select(0, kept), z.index_select(0, kept)
        x = layer.feed_forward(x, layer.attention.output(z))
    if keep is not None:
        x = x.new_zeros(len(keep), x.shape[1]).index_copy(0, kept, x)
    return x[: packing.num_hyper], x[packing.num_hyper :]
