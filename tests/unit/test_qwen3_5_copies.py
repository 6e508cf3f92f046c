"""Row copies and their sums against torch's indexing: values and gradients, including rows without copies."""

import pytest
import torch

from milepost.qwen3_5.copies import copy_rows, find_copies, sum_copies

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize(("rows", "readers", "most"), [(5, 7, 3), (1, 1, 1), (40, 16, 8), (3, 2, 2)])
def test_copies_and_sums_are_those_of_indexing(rows, readers, most):
    generator = torch.Generator().manual_seed(rows)
    wanted = torch.rand(rows, readers, generator=generator).argsort(1) < most
    wanted &= torch.rand(rows, readers, generator=generator) < 0.8
    wanted[0] = rows == 1
    reader, owners = wanted.T.nonzero().unbind(1)
    found, copies = find_copies(wanted, len(owners), most)
    assert found.equal(reader) and copies.owners.equal(owners)
    source = torch.randn(rows, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    values = torch.randn(len(owners), 6, dtype=torch.float64, generator=generator, requires_grad=True)
    torch.testing.assert_close(copy_rows(source, copies), source[owners])
    expected = torch.zeros(rows, 6, dtype=torch.float64).index_add(0, owners, values)
    torch.testing.assert_close(sum_copies(values, copies), expected)
    assert torch.autograd.gradcheck(lambda x: copy_rows(x, copies), source)
    assert torch.autograd.gradcheck(lambda x: sum_copies(x, copies), values)


@pytest.mark.parametrize("rows", [4, 0])
def test_no_copies_at_all(rows):
    _, copies = find_copies(torch.zeros(rows, 3, dtype=torch.bool), 0, 2)
    assert copy_rows(torch.randn(rows, 3), copies).shape == (0, 3)
    assert sum_copies(torch.empty(0, 3), copies).equal(torch.zeros(rows, 3))


def test_a_sum_of_bf16_is_rounded_once():
    values = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 is 256 in bf16
    _, copies = find_copies(torch.ones(1, 3, dtype=torch.bool), 3, 3)
    assert sum_copies(values, copies).item() == 258.0
