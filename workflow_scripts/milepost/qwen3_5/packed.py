"""Packs: several sequences concatenated into one row, so that a batch contains no padding.

Sequences with a common prefix, such as the samples of one prompt, can share the rows of that prefix: tokenwise layers
(projections, norms, MLPs: nearly all of the work) then compute it once, and only the two kinds of attention expand the
rows to sequences. Without shared prefixes every token is a row.

Context parallelism splits a pack's rows into equal runs, one per rank, even within a sequence: both kinds of attention
exchange rows for heads (all-to-all) and then see every sequence whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

WORTH_SHARING = 0.1  # the least share of a pack's tokens to save; expanding the rows costs copies


@dataclass
class ChunkLayout:
    """Where a pack's tokens go when each sequence is padded to a multiple of ``size`` tokens.

    Chunks are ordered by their index within the sequence, then by sequence, longest first: the sequences that have a
    j-th chunk are the first ``counts[j]`` of those that have a (j-1)-th.
    """

    size: int
    counts: list[int]
    slots: Tensor  # (T,) place of each token among the sum(counts) * size


@dataclass
class Bucket:
    """Sequences of similar length, padded to the longest of them."""

    count: int
    length: int
    tokens: Tensor | None  # (n,) the pack's tokens that belong here; None for all
    slots: Tensor  # (n,) their places among count * length


@dataclass
class Packed(PackedSeqParams):
    """The layout of a pack (the whole pack, also under context parallelism), as Megatron-Core hands it to layers.

    `pack` makes it. T is the number of tokens in the sequences, R <= T the number of rows. ``lengths`` and
    ``host_boundaries`` repeat ``cu_seqlens_q`` on the host, so that no layer syncs with the GPU; flash-linear-attention
    caches what it derives from ``boundaries`` by tensor identity.
    """

    lengths: tuple[int, ...] = ()
    positions: Tensor | None = None  # (T,) position of every token in its sequence
    boundaries: Tensor | None = None  # (S + 1,) cu_seqlens_q as int64
    host_boundaries: Tensor | None = None  # (S + 1,) the same on the CPU
    row_of_token: Tensor | None = None  # (T,); None where every token is a row
    token_of_row: Tensor | None = None  # (R,) the first token of each row
    _layouts: dict = field(default_factory=dict, repr=False, compare=False)

    def spread(self, rows: Tensor) -> Tensor:
        """Expand values of rows to tokens: (R, ...) -> (T, ...)."""
        return rows if self.row_of_token is None else rows.index_select(0, self.row_of_token)

    def collect(self, tokens: Tensor) -> Tensor:
        """Pick the values of each row's first token: (T, ...) -> (R, ...)."""
        return tokens if self.token_of_row is None else tokens.index_select(0, self.token_of_row)

    def chunks(self, size: int) -> ChunkLayout:
        """The layout in chunks of ``size`` tokens; cached."""
        if ("chunks", size) not in self._layouts:
            self._layouts["chunks", size] = self._chunk_layout(size)
        return self._layouts["chunks", size]

    def buckets(self) -> list[Bucket]:
        """The sequences by length: one bucket if its padding is modest, else one for every power of two; cached."""
        if "buckets" not in self._layouts:
            self._layouts["buckets"] = self._bucket_sequences()
        return self._layouts["buckets"]

    def earlier_rows(self, back: int) -> Tensor:
        """For each row, the row ``back`` tokens earlier in its sequence (R,); R if there is none."""
        if ("earlier", back) not in self._layouts:
            token = torch.arange(len(self.positions)) if self.token_of_row is None else self.token_of_row
            row = token if self.row_of_token is None else self.row_of_token
            earlier = row[(token - back).clamp(min=0)]
            self._layouts["earlier", back] = earlier.masked_fill(self.positions[token] < back, len(token))
        return self._layouts["earlier", back]

    def _sequence_of_token(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))

    def _chunk_layout(self, size: int) -> ChunkLayout:
        chunks = (torch.tensor(self.lengths) + size - 1) // size  # (S,)
        order = torch.argsort(chunks, descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        counts = [int((chunks > number).sum()) for number in range(int(chunks.max()))]
        first = torch.tensor([0, *counts]).cumsum(0)
        positions = self.positions.cpu()
        chunk = first[positions // size] + rank[self._sequence_of_token()]
        return ChunkLayout(size, counts, (chunk * size + positions % size).to(self.positions.device))

    def _bucket_sequences(self) -> list[Bucket]:
        lengths = torch.tensor(self.lengths)
        modest = len(lengths) * int(lengths.max()) <= 1.5 * int(lengths.sum())
        classes = torch.tensor([0 if modest else length.bit_length() for length in self.lengths])
        sequence, positions = self._sequence_of_token(), self.positions.cpu()
        buckets = []
        for kind in classes.unique().tolist():
            members = classes == kind
            longest = int(lengths[members].max())
            row = members.cumsum(0) - 1  # (S,) row of a sequence in its bucket
            tokens = members[sequence].nonzero()[:, 0]
            slots = row[sequence[tokens]] * longest + positions[tokens]
            everything = len(tokens) == len(positions)
            device = self.positions.device
            buckets.append(
                Bucket(int(members.sum()), longest, None if everything else tokens.to(device), slots.to(device))
            )
        return buckets


def pack(
    sequences: Sequence[Sequence[int] | Tensor],
    *,
    prefixes: Sequence[int] = (),
    multiple_of: int = 1,
    padding_id: int = 0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Packed]:
    """Concatenate sequences of token ids: ``(input_ids (1, R), position_ids (1, R), packed)``.

    Args:
        prefixes: for each sequence, the number of leading tokens to share with sequences that start with the same ones;
            less than its length. If sharing would save less than `WORTH_SHARING`, nothing is shared.
        multiple_of: pad R to a multiple of this (tensor x context parallel size) with one more sequence, of
            ``padding_id``. Other sequences don't see it; mask its tokens out of every loss.
    """
    rows = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    if not rows or any(len(row) == 0 for row in rows):
        raise ValueError("a pack needs at least one sequence, and no empty ones")
    row_of_token = _share_prefixes(rows, prefixes) if prefixes else None
    missing = -(sum(map(len, rows)) if row_of_token is None else int(row_of_token.max()) + 1) % multiple_of
    if missing:
        rows.append(torch.full((missing,), padding_id, dtype=torch.long))
        if row_of_token is not None:
            row_of_token = torch.cat([row_of_token, row_of_token.max() + 1 + torch.arange(missing)])
    token_of_row = None if row_of_token is None else _first_places(row_of_token)
    lengths = tuple(len(row) for row in rows)
    host_boundaries = torch.tensor([0, *lengths]).cumsum(0)
    boundaries = host_boundaries.to(device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    packed = Packed(
        qkv_format="thd",
        cu_seqlens_q=boundaries.int(),
        cu_seqlens_kv=boundaries.int(),
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
        positions=positions,
        boundaries=boundaries,
        host_boundaries=host_boundaries,
        row_of_token=None if row_of_token is None else row_of_token.to(device),
        token_of_row=None if token_of_row is None else token_of_row.to(device),
    )
    return packed.collect(torch.cat(rows).to(device))[None], packed.collect(positions)[None], packed


def _share_prefixes(sequences: list[Tensor], prefixes: Sequence[int]) -> Tensor | None:
    """The row of every token (T,) when common prefixes are stored once; None if that saves too little."""
    shared: dict[bytes, Tensor] = {}
    rows, taken = [], 0
    for sequence, length in zip(sequences, prefixes, strict=True):
        if length >= len(sequence):
            raise ValueError(f"a prefix of {length} tokens leaves nothing of a sequence of {len(sequence)}")
        prefix = sequence[:length].numpy().tobytes()
        if prefix not in shared:
            shared[prefix] = torch.arange(taken, taken + length)
            taken += length
        rows += [shared[prefix], torch.arange(taken, taken + len(sequence) - length)]
        taken += len(sequence) - length
    total = sum(map(len, sequences))
    return torch.cat(rows) if total - taken > WORTH_SHARING * total else None


def _first_places(rows: Tensor) -> Tensor:
    """The first token of each row: (T,) -> (R,)."""
    first = torch.full((int(rows.max()) + 1,), len(rows))
    return first.scatter_reduce_(0, rows, torch.arange(len(rows)), "amin")


def context_shard(values: Tensor, dim: int = -1) -> Tensor:
    """This context-parallel rank's part of ``values``, which have one entry per row along ``dim``."""
    size = parallel_state.get_context_parallel_world_size()
    return values.chunk(size, dim)[parallel_state.get_context_parallel_rank()] if size > 1 else values


def shift_left(values: Tensor, packed: Packed, by: int = 1) -> Tensor:
    """Replace entry t by entry t + ``by`` of the same sequence, or 0 past its end; (..., T).

    Only for packs without shared prefixes, whose last token has several next tokens.
    """
    assert packed.row_of_token is None
    shifted = torch.zeros_like(values)
    shifted[..., :-by] = values[..., by:]
    remaining = torch.cat([torch.arange(length, 0, -1) for length in packed.lengths]).to(values.device)
    return shifted.masked_fill(remaining <= by, 0)
