"""Invalid layouts are refused before a run, with the key to change."""

import pytest
from test_qwen3_5_architecture import DENSE_9B, MOE_35B, read

from milepost.configuration.layout import shape_fault
from milepost.configuration.schema import Parallel
from settings import section

FLEX = section("experts", dispatcher="flex")


def test_the_recipes_layouts_and_their_halves_are_allowed():
    dense, moe = read(DENSE_9B), read(MOE_35B)
    for parallel in (Parallel(), Parallel(tensor=2), Parallel(tensor=4), Parallel(tensor=2, context=2)):
        assert shape_fault(dense, parallel, FLEX, on_gpu=True) is None
    for parallel in (Parallel(expert=8), Parallel(expert=4), Parallel(expert=2), Parallel(pipeline=2, expert=4)):
        assert shape_fault(moe, parallel, FLEX, on_gpu=True) is None


@pytest.mark.parametrize(
    ("text", "parallel", "experts", "key"),
    [
        (DENSE_9B, Parallel(tensor=3), FLEX, "parallel.tensor"),
        (DENSE_9B, Parallel(tensor=4, context=8), FLEX, "parallel.tensor"),
        (DENSE_9B, Parallel(tensor=8), FLEX, "parallel.tensor"),  # 4 key-value groups
        (DENSE_9B, Parallel(pipeline=3), FLEX, "parallel.pipeline"),
        (DENSE_9B, Parallel(expert=2), FLEX, "parallel.expert"),
        (MOE_35B, Parallel(expert=3), FLEX, "parallel.expert"),
        (MOE_35B, Parallel(expert_tensor=3), FLEX, "parallel.expert_tensor"),
        (MOE_35B, Parallel(tensor=2, sequence=False), FLEX, "parallel.sequence"),
        (MOE_35B, Parallel(expert_tensor=2), section("experts", dispatcher="alltoall"), "experts.dispatcher"),
        (MOE_35B, Parallel(expert=2), section("experts", dispatcher="flex", deepep=True), "experts.deepep"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_by_its_key(text, parallel, experts, key):
    assert shape_fault(read(text), parallel, experts, on_gpu=False).key == key


def test_alltoall_over_expert_tensor_ranks_needs_a_gpu():
    parallel, experts = Parallel(expert_tensor=2), section("experts", dispatcher="alltoall")
    assert shape_fault(read(MOE_35B), parallel, experts, on_gpu=True) is None
    for other in ("flex", "allgather"):
        assert shape_fault(read(MOE_35B), parallel, section("experts", dispatcher=other), on_gpu=False) is None
