"""Copies of rows and their sums against torch's indexing: values and gradients, rows without copies included."""

import pytest
import torch

from qwen3_5.copies import copy_rows, find_copies, sum_copies


@pytest.mark.parametrize(("rows", "most"), [(5, 3), (1, 1), (40, 8), (3, 2)])
def test_copies_and_sums_are_those_of_indexing(rows, most):
    generator = torch.Generator().manual_seed(rows)
    counts = torch.randint(0, most + 1, (rows,), generator=generator)
    counts[0] = 0 if rows > 1 else most
    owners = torch.repeat_interleave(torch.arange(rows), counts)
    owners = owners[torch.randperm(len(owners), generator=generator)]
    copies = find_copies(owners, rows, most)
    source = torch.randn(rows, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    values = torch.randn(len(owners), 6, dtype=torch.float64, generator=generator, requires_grad=True)
    torch.testing.assert_close(copy_rows(source, copies), source[owners])
    expected = torch.zeros(rows, 6, dtype=torch.float64).index_add(0, owners, values)
    torch.testing.assert_close(sum_copies(values, copies), expected)
    if len(owners):
        assert torch.autograd.gradcheck(lambda x: copy_rows(x, copies), source)
        assert torch.autograd.gradcheck(lambda x: sum_copies(x, copies), values)


def test_no_copies_at_all():
    copies = find_copies(torch.empty(0, dtype=torch.long), 4, 2)
    assert copy_rows(torch.randn(4, 3), copies).shape == (0, 3)
    assert sum_copies(torch.empty(0, 3), copies).equal(torch.zeros(4, 3))
    assert find_copies(torch.empty(0, dtype=torch.long), 0, 2).places.shape == (0, 2)


def test_a_sum_of_bf16_is_rounded_once():
    values = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 is 256 in bf16
    copies = find_copies(torch.zeros(3, dtype=torch.long), 1, 3)
    assert sum_copies(values, copies).item() == 258.0
