from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ipu_pipeline.ops.projection import serialized_linear

MODES = ("output_channels", "reducing_dim", "input_channels")


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [1, 2, 4, 6])
def test_output_and_gradients_are_those_of_linear(mode: str, factor: int) -> None:
    x, weight, bias = operands()
    compare(x, weight, bias, factor=factor, mode=mode)
    compare(x, weight, None, factor=factor, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_against_differences(mode: str) -> None:
    x, weight, bias = operands()
    assert torch.autograd.gradcheck(
        lambda *args: serialized_linear(*args, factor=3, mode=mode), (x, weight, bias)
    )


@pytest.mark.parametrize("mode", MODES)
def test_non_contiguous_operands(mode: str) -> None:
    x, weight, bias = operands()
    x = x.detach().transpose(0, 1).requires_grad_()
    weight = weight.detach().t().contiguous().t().requires_grad_()
    assert not x.is_contiguous()
    compare(x, weight, bias, factor=3, mode=mode)
    compare(x[:, 0], weight, bias, factor=3, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_without_rows(mode: str) -> None:
    x, weight, bias = operands(rows=0)
    compare(x, weight, bias, factor=3, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, 1)])
def test_only_the_wanted_gradients(mode: str, wanted: tuple[bool, ...]) -> None:
    leaves = [each.requires_grad_(bool(w)) for each, w in zip(operands(), wanted, strict=True)]
    serialized_linear(*leaves, factor=2, mode=mode).sum().backward()
    assert [each.grad is not None for each in leaves] == [bool(w) for w in wanted]


@pytest.mark.parametrize("mode", MODES)
def test_autocast_gives_the_type_of_linear(mode: str) -> None:
    x, weight, bias = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = serialized_linear(x, weight, bias, factor=2, mode=mode)
        expected = functional.linear(x, weight, bias)
        got.float().sum().backward()
    assert got.dtype is expected.dtype is torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.05)


def test_more_slices_than_rows_of_the_input() -> None:
    compare(*operands(rows=1), factor=5, mode="input_channels")


def test_refusals() -> None:
    x, weight, bias = operands()
    with pytest.raises(ValueError, match="mode 'rows' is unknown; use one of output_channels"):
        serialized_linear(x, weight, bias, factor=2, mode="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"factor 12 cannot cut output_channels of a 11 x 6"):
        serialized_linear(x, weight, bias, factor=12)
    with pytest.raises(ValueError, match=r"factor 7 cannot cut reducing_dim .* use 1 to 6"):
        serialized_linear(x, weight, bias, factor=7, mode="reducing_dim")
    with pytest.raises(ValueError, match="factor 0 cannot cut input_channels"):
        serialized_linear(x, weight, bias, factor=0, mode="input_channels")
