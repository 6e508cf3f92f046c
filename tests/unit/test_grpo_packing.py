"""Packing: nothing lost, nothing over the budget, the same work for every rank."""

from hypothesis import given
from hypothesis import strategies as st

from milepost.grpo.packing import pack_sequences

LENGTHS = st.lists(st.integers(1, 100), max_size=60)


@given(LENGTHS, st.integers(1, 300), st.integers(1, 5))
def test_every_sequence_is_in_exactly_one_pack(lengths, budget, ranks):
    dealt = pack_sequences(lengths, budget, ranks)
    assert sorted(index for packs in dealt for pack in packs for index in pack) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 300), st.integers(1, 5))
def test_only_a_sequence_longer_than_the_budget_exceeds_it_and_then_alone(lengths, budget, ranks):
    for pack in (pack for packs in pack_sequences(lengths, budget, ranks) for pack in packs):
        assert len(pack) <= 1 or sum(lengths[index] for index in pack) <= budget


@given(LENGTHS, st.integers(1, 300), st.integers(1, 5))
def test_ranks_have_equally_many_packs_and_none_is_empty_while_another_could_be_split(lengths, budget, ranks):
    dealt = pack_sequences(lengths, budget, ranks)
    packs = [pack for packs in dealt for pack in packs]
    assert len({len(packs) for packs in dealt}) == 1
    assert all(packs) or max(map(len, packs)) == 1


@given(LENGTHS, st.integers(1, 300))
def test_packs_number_at_most_what_first_fit_promises(lengths, budget):
    """Two neighbouring packs of first-fit never fit into one, so fewer than twice the least possible number is used."""
    packs = pack_sequences(lengths, budget)[0]
    assert len(packs) <= 1 or len(packs) < 2 * sum(lengths) / budget + 1


def test_packs_are_dealt_evenly():
    dealt = pack_sequences([90, 80, 70, 60, 50, 40, 30, 20], 100, 2)
    loads = [sum([90, 80, 70, 60, 50, 40, 30, 20][i] for pack in packs for i in pack) for packs in dealt]
    assert abs(loads[0] - loads[1]) <= 20


def test_two_ranks_share_what_would_fit_one_pack():
    assert [[len(pack) for pack in packs] for packs in pack_sequences([5, 5, 5, 5], 100, 2)] == [[2], [2]]
