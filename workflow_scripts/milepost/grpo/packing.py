"""Packing: which sequences share a forward pass, and on which data-parallel rank."""

from collections.abc import Sequence

Pack = list[int]


def pack_sequences(lengths: Sequence[int], budget: int, ranks: int = 1) -> list[list[Pack]]:
    """Pack sequences first-fit-decreasing into ``budget`` tokens, and distribute the packs over data-parallel ranks.

    Every rank gets the same number of packs, since each pack involves collectives across ranks (experts, gradients).
    Ties go to the lower index, so the same lengths always give the same packs.

    Args:
        lengths: tokens of each sequence; one longer than the budget gets a pack of its own.
        budget: tokens per pack.
        ranks: data-parallel ranks.

    Returns:
        each rank's packs, as lists of indices into ``lengths``; packs at the same position are of similar size. A pack
        is empty only if there are fewer sequences than ranks.
    """
    packs = _first_fit_decreasing(lengths, budget)
    wanted = -(-len(packs) // ranks) * ranks
    while len(packs) < wanted:
        packs.append(_split_off(packs, lengths))
    return _deal(packs, lengths, ranks)


def _first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[Pack]:
    packs: list[Pack] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = next((place for place, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            packs.append([index])
            room.append(budget - lengths[index])
        else:
            packs[place].append(index)
            room[place] -= lengths[index]
    return packs


def _split_off(packs: list[Pack], lengths: Sequence[int]) -> Pack:
    """Take about half of the heaviest pack that can be split; empty if none can."""
    divisible = [pack for pack in packs if len(pack) > 1]
    if not divisible:
        return []
    heaviest = max(divisible, key=lambda pack: _load(pack, lengths))
    kept: Pack = []
    moved: Pack = []
    for index in heaviest:  # longest first: each to the lighter half
        (kept if _load(kept, lengths) <= _load(moved, lengths) else moved).append(index)
    heaviest[:] = kept
    return moved


def _deal(packs: list[Pack], lengths: Sequence[int], ranks: int) -> list[list[Pack]]:
    """Assign the packs, heaviest first, to the lightest rank that still needs one."""
    dealt: list[list[Pack]] = [[] for _ in range(ranks)]
    each = len(packs) // ranks
    for pack in sorted(packs, key=lambda pack: (-_load(pack, lengths), pack)):
        open_ranks = [rank for rank in range(ranks) if len(dealt[rank]) < each]
        lightest = min(open_ranks, key=lambda rank: (sum(_load(other, lengths) for other in dealt[rank]), rank))
        dealt[lightest].append(pack)
    return dealt


def _load(pack: Pack, lengths: Sequence[int]) -> int:
    return sum(lengths[index] for index in pack)
