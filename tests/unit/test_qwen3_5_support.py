"""Layouts that are refused before a run, each by the key to change."""

import pytest
from test_qwen3_5_architecture import DENSE_9B, MOE_35B, read

from configuration.schema import Experts, Parallel
from qwen3_5.support import layout_faults, supported_dispatchers

FLEX = Experts(dispatcher="flex")


def test_the_recipes_layouts_and_their_halves_are_allowed():
    dense, moe = read(DENSE_9B), read(MOE_35B)
    for parallel in (Parallel(), Parallel(tensor=2), Parallel(tensor=4), Parallel(tensor=2, context=2)):
        assert layout_faults(dense, parallel, FLEX, "cuda") == []
    for parallel in (Parallel(expert=8), Parallel(expert=4), Parallel(expert=2), Parallel(pipeline=2, expert=4)):
        assert layout_faults(moe, parallel, FLEX, "cuda") == []


@pytest.mark.parametrize(
    ("text", "parallel", "experts", "key"),
    [
        (DENSE_9B, Parallel(tensor=3), FLEX, "parallel.tensor"),
        (DENSE_9B, Parallel(tensor=4, context=8), FLEX, "parallel.tensor"),
        (DENSE_9B, Parallel(pipeline=3), FLEX, "parallel.pipeline"),
        (DENSE_9B, Parallel(expert=2), FLEX, "parallel.expert"),
        (MOE_35B, Parallel(expert=3), FLEX, "parallel.expert"),
        (MOE_35B, Parallel(expert_tensor=3), FLEX, "parallel.expert_tensor"),
        (MOE_35B, Parallel(tensor=2, sequence=False), FLEX, "parallel.sequence"),
        (MOE_35B, Parallel(expert_tensor=2), Experts(dispatcher="alltoall"), "experts.dispatcher"),
        (MOE_35B, Parallel(expert=2), Experts(dispatcher="flex", deepep=True), "experts.deepep"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_by_its_key(text, parallel, experts, key):
    assert layout_faults(read(text), parallel, experts, "cpu")[0].startswith(key + ":")


def test_alltoall_over_expert_tensor_ranks_needs_a_gpu():
    assert "alltoall" not in supported_dispatchers("cpu", expert_tensor=2)
    assert "alltoall" in supported_dispatchers("cuda", expert_tensor=2)
    assert supported_dispatchers("cpu") == {"allgather", "alltoall", "flex"}
