"""Packs: several sequences laid end to end in one row, so that no token of a batch is padding.

Sequences that begin alike, as the samples of one prompt do, can share the rows of their prefix: whatever looks at one
token at a time (projections, norms, MLPs: nearly all of the work) then computes it once, and only the two kinds of
attention spread the rows over the sequences. Without shared prefixes every token is a row.

Under context parallelism the rows of a pack are cut into equal runs, one a rank, wherever the cut falls: both kinds
of attention exchange rows for heads (all-to-all) and then see every sequence whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

WORTH_SHARING = 0.1  # of a pack's tokens; to spread the rows costs some copies


@dataclass
class ChunkLayout:
    """Where the tokens of a pack go when each sequence is padded to whole chunks of ``size`` tokens.

    Chunks are ordered by their number within the sequence, and within one number by sequence, longest first: the
    sequences that have a j-th chunk are the first ``counts[j]`` of those that have a (j-1)-th.
    """

    size: int
    counts: list[int]
    slots: Tensor  # (T,) place of each token among the sum(counts) * size


@dataclass
class Bucket:
    """Sequences of similar length, to be padded to the longest of them."""

    count: int
    length: int
    tokens: Tensor | None  # (n,) the pack's tokens that belong here; None for all
    slots: Tensor  # (n,) their places among count * length


@dataclass
class Packed(PackedSeqParams):
    """The boundaries of a pack (of the whole pack, also under context parallelism), as Megatron-Core passes them on.

    Made by `pack`. T counts the tokens of the sequences, R <= T the rows. ``lengths`` and ``host_boundaries`` repeat
    ``cu_seqlens_q`` on the host, so that no layer has to wait for the GPU; flash-linear-attention keeps what it works
    out of ``boundaries`` for as long as it is the same tensor.
    """

    lengths: tuple[int, ...] = ()
    positions: Tensor | None = None  # (T,) place of every token in its sequence
    boundaries: Tensor | None = None  # (S + 1,) cu_seqlens_q in 64 bits
    host_boundaries: Tensor | None = None  # (S + 1,) the same on the CPU
    row_of_token: Tensor | None = None  # (T,); None where every token is a row
    token_of_row: Tensor | None = None  # (R,) the first token that a row stands for
    _layouts: dict = field(default_factory=dict, repr=False, compare=False)

    def spread(self, rows: Tensor) -> Tensor:
        """What is known of the rows, for every token: (R, ...) to (T, ...)."""
        return rows if self.row_of_token is None else rows.index_select(0, self.row_of_token)

    def collect(self, tokens: Tensor) -> Tensor:
        """What is known of the tokens, for every row: (T, ...) to (R, ...)."""
        return tokens if self.token_of_row is None else tokens.index_select(0, self.token_of_row)

    def chunks(self, size: int) -> ChunkLayout:
        """The layout in chunks of ``size`` tokens; worked out once."""
        if ("chunks", size) not in self._layouts:
            self._layouts["chunks", size] = self._chunk_layout(size)
        return self._layouts["chunks", size]

    def buckets(self) -> list[Bucket]:
        """The sequences by length: one bucket where its padding is modest, else one for every power of two."""
        if "buckets" not in self._layouts:
            self._layouts["buckets"] = self._bucket_sequences()
        return self._layouts["buckets"]

    def earlier_rows(self, back: int) -> Tensor:
        """For each row the one ``back`` tokens before it in its sequence, (R,); R where the sequence has none."""
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
    """Lay sequences of token ids end to end: ``(input_ids (1, R), position_ids (1, R), packed)``.

    Args:
        prefixes: how many first tokens of each sequence to share with those that begin with the very same ones; no
            more than it has less one. Without much to share nothing is.
        multiple_of: what R has to be a multiple of (tensor times context parallel size). A further sequence of
            ``padding_id`` fills up, which like any other is seen by nobody else; mask its tokens out of every loss.
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
    """The row of every token (T,) when a prefix that several sequences have stands once; None where it saves little."""
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
    """For each row the first token that it stands for: (T,) to (R,)."""
    first = torch.full((int(rows.max()) + 1,), len(rows))
    return first.scatter_reduce_(0, rows, torch.arange(len(rows)), "amin")


def context_shard(values: Tensor, dim: int = -1) -> Tensor:
    """This context-parallel rank's run of rows of anything that has one entry a row along ``dim``."""
    size = parallel_state.get_context_parallel_world_size()
    return values.chunk(size, dim)[parallel_state.get_context_parallel_rank()] if size > 1 else values


def shift_left(values: Tensor, packed: Packed, by: int = 1) -> Tensor:
    """Entry t becomes entry t + ``by`` of the same sequence, and 0 where the sequence has none; (..., T).

    The next token of a shared prefix's last one is not one: nothing may be shared.
    """
    assert packed.row_of_token is None
    shifted = torch.zeros_like(values)
    shifted[..., :-by] = values[..., by:]
    remaining = torch.cat([torch.arange(length, 0, -1) for length in packed.lengths]).to(values.device)
    return shifted.masked_fill(remaining <= by, 0)
