"""Sums of dense and sparse gradients end dense, in a fixed order, and change nobody's tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ipu_pipeline.stages.serialize import GradientSum, LookupLeaves, add_gradient, add_sums

ROWS, WIDTH = 6, 2


def sparse(*rows: int) -> Tensor:
    values = torch.arange(1.0, 1 + len(rows) * WIDTH).reshape(len(rows), WIDTH)
    return torch.sparse_coo_tensor(
        torch.tensor([rows]), values, (ROWS, WIDTH), check_invariants=False
    ).coalesce()


def test_gradients_become_dense() -> None:
    parameter = nn.Parameter(torch.zeros(ROWS, WIDTH))
    add_gradient(parameter, sparse(1, 4))
    assert parameter.grad is not None
    assert not parameter.grad.is_sparse
    memory = parameter.grad.data_ptr()
    add_gradient(parameter, sparse(1))
    add_gradient(parameter, torch.ones(ROWS, WIDTH))
    assert parameter.grad.data_ptr() == memory
    expected = sparse(1, 4).to_dense() + sparse(1).to_dense() + 1
    assert torch.equal(parameter.grad, expected)


def test_a_new_gradient_has_the_strides_of_its_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(ROWS, WIDTH))
    gradient = torch.arange(12.0).reshape(WIDTH, ROWS).t()
    add_gradient(parameter, gradient)
    assert parameter.grad is not None
    assert parameter.grad.stride() == parameter.stride()
    assert torch.equal(parameter.grad, gradient)


def test_sums_leave_what_they_were_given() -> None:
    first = torch.ones(ROWS, WIDTH)
    total = GradientSum()
    for gradient in (first, sparse(0), torch.ones(ROWS, WIDTH), torch.ones(ROWS, WIDTH), sparse(0)):
        total.add(gradient)
    assert torch.equal(first, torch.ones(ROWS, WIDTH))
    assert total.dense is not None
    assert total.sparse is not None
    assert torch.equal(total.dense, 3 * first)
    assert torch.equal(total.sparse.to_dense(), 2 * sparse(0).to_dense())


def test_sparse_sums_become_dense_before_they_outgrow_the_table() -> None:
    total = GradientSum()
    for rows in ((0, 1, 5), (5,), (2, 3, 4)):
        total.add(sparse(*rows))
    expected = sparse(0, 1, 5).to_dense() + sparse(5).to_dense() + sparse(2, 3, 4).to_dense()
    assert total.dense is not None
    assert torch.equal(total.dense, expected)
    assert total.sparse is None


def test_stages_are_added_up_whatever_they_hold() -> None:
    for existing in (None, torch.full((ROWS, WIDTH), 5.0)):
        parts = [GradientSum(), GradientSum(), GradientSum()]
        parts[0].add(sparse(2))
        dense = torch.ones(ROWS, WIDTH)
        parts[2].add(dense)
        parts[2].add(sparse(3))
        parameter = nn.Parameter(torch.zeros(ROWS, WIDTH))
        parameter.grad = None if existing is None else existing.clone()
        add_sums(parameter, parts)
        expected = sparse(2).to_dense() + sparse(3).to_dense() + 1
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected + (0 if existing is None else existing))
        assert torch.equal(dense, torch.ones(ROWS, WIDTH))


def test_stand_ins_share_memory_and_are_made_once() -> None:
    leaves = LookupLeaves()
    table = nn.Parameter(torch.zeros(ROWS, WIDTH))
    frozen = nn.Parameter(torch.zeros(ROWS, WIDTH), requires_grad=False)
    leaf = leaves.of(table)
    assert leaf is leaves.of(table)
    assert leaf.data_ptr() == table.data_ptr()
    assert leaves.of(frozen) is frozen
    with torch.no_grad():
        assert leaves.of(table) is table
    assert leaves.pairs() == ((table, leaf),)
