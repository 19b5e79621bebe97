from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ipu_pipeline.ops.projection import serialized_linear


def operands(dtype: torch.dtype = torch.float64, rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, rows, 6), (11, 6), (11,))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def compare(x: Tensor, weight: Tensor, bias: Tensor | None, **options: object) -> None:
    leaves = [each for each in (x, weight, bias) if each is not None]
    got = serialized_linear(x, weight, bias, **options)
    expected = functional.linear(x, weight, bias)
    assert got.shape == expected.shape
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("factor", [1, 2, 4, 6])
def test_output_and_gradients_are_those_of_linear(factor: int) -> None:
    x, weight, bias = operands()
    compare(x, weight, bias, factor=factor)
    compare(x, weight, None, factor=factor)


def test_gradients_against_differences() -> None:
    x, weight, bias = operands()
    assert torch.autograd.gradcheck(
        lambda *args: serialized_linear(*args, factor=3), (x, weight, bias)
    )


def test_non_contiguous_operands() -> None:
    x, weight, bias = operands()
    x = x.detach().transpose(0, 1).requires_grad_()
    weight = weight.detach().t().contiguous().t().requires_grad_()
    assert not x.is_contiguous()
    compare(x, weight, bias, factor=3)
    compare(x[:, 0], weight, bias, factor=3)


def test_without_rows() -> None:
    x, weight, bias = operands(rows=0)
    compare(x, weight, bias, factor=3)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, 1)])
def test_only_the_wanted_gradients(wanted: tuple[bool, ...]) -> None:
    leaves = [each.requires_grad_(bool(w)) for each, w in zip(operands(), wanted, strict=True)]
    serialized_linear(*leaves, factor=2).sum().backward()
    assert [each.grad is not None for each in leaves] == [bool(w) for w in wanted]


def test_autocast_gives_the_type_of_linear() -> None:
    x, weight, bias = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = serialized_linear(x, weight, bias, factor=2)
        expected = functional.linear(x, weight, bias)
        got.float().sum().backward()
    assert got.dtype is expected.dtype is torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.05)


def test_refusals() -> None:
    x, weight, bias = operands()
    for factor in (0, 12):
        with pytest.raises(ValueError, match=rf"factor {factor} cannot cut the 11 output channels"):
            serialized_linear(x, weight, bias, factor=factor)
