"""Attention with counted dropout against torch's own path, given the same mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ipu_pipeline.ops import attention
from ipu_pipeline.ops import random as ops_random
from ipu_pipeline.ops.attention import attention_counter
from ipu_pipeline.ops.dropout import dropout_counter
from ipu_pipeline.ops.random import block_scope
from tests.ops.paths import choose

H, L, S, E, F = 4, 10, 13, 8, 5
KEY = (77, 3)
MASKS = {
    "none": None,
    "bool": torch.rand(L, S, generator=torch.Generator().manual_seed(1)) > 0.4,
    "a blind query": torch.arange(L)[:, None].expand(L, S) != 2,
    "float": torch.randn(H, L, S, generator=torch.Generator().manual_seed(2)),
    "padding": torch.where(torch.arange(S) < 9, 0.0, -torch.inf)[None, None],
}


@pytest.fixture(params=["kernel", 1 << 20, 2 * L * S, 1],
                ids=["kernel", "one part", "two heads", "one head"])  # fmt: skip
def path(request, monkeypatch) -> None:
    """The kernel, or how many elements plain torch computes at once."""
    if not choose(request.param, attention, request, monkeypatch):
        monkeypatch.setattr(attention, "_ELEMENTS", request.param)


def inputs(*batch: int, num_heads: int = H, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(H, L, E), (num_heads, S, E), (num_heads, S, F)]
    return [
        torch.randn(*batch, *shape, generator=generator).to(dtype).requires_grad_()
        for shape in shapes
    ]


def composed(monkeypatch, tensors, *arguments, **options) -> Tensor:
    """Torch's own path; its only mask is drawn from KEY."""
    with monkeypatch.context() as patch:
        patch.setattr(ops_random, "_OWN", {})
        patch.setattr(ops_random._Source, "mask_key", lambda self: KEY)
        with block_scope("any"):
            return functional.scaled_dot_product_attention(*tensors, *arguments, **options)


def assert_same(found: Tensor, expected: Tensor, tensors: list[Tensor], tolerance: float) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(4)).to(found.dtype)
    for mine, other in zip(
        torch.autograd.grad(found, tensors, upstream),
        torch.autograd.grad(expected, tensors, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_equals_torch(path, monkeypatch, mask: str, batch) -> None:
    tensors = inputs(*batch)
    found = attention_counter(KEY, *tensors, MASKS[mask], 0.3)
    assert_same(found, composed(monkeypatch, tensors, MASKS[mask], 0.3), tensors, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_equals_torch_in_every_type(path, monkeypatch, dtype) -> None:
    tensors = inputs(2, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    found = attention_counter(KEY, *tensors, MASKS["bool"], 0.3)
    assert_same(found, composed(monkeypatch, tensors, MASKS["bool"], 0.3), tensors, tolerance)


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"scale": 0.7}, {"is_causal": True, "enable_gqa": True}]
)
@pytest.mark.parametrize("num_heads", [H, 2, 1])
def test_options(path, monkeypatch, options, num_heads: int) -> None:
    if num_heads != H and "enable_gqa" not in options:
        options = {**options, "enable_gqa": True}
    tensors = inputs(2, num_heads=num_heads)
    found = attention_counter(KEY, *tensors, dropout_p=0.3, **options)
    assert_same(found, composed(monkeypatch, tensors, dropout_p=0.3, **options), tensors, 1e-5)


def test_the_extremes_of_dropout(path) -> None:
    tensors = inputs(2)
    without = functional.scaled_dot_product_attention(*tensors)
    torch.testing.assert_close(attention_counter(KEY, *tensors), without)
    assert not attention_counter(KEY, *tensors, dropout_p=1.0).any()


def test_the_mask_is_that_of_the_whole_matrix(path) -> None:
    q, k, _ = inputs(3)
    weights = attention_counter(KEY, q, k, torch.eye(S).expand(3, H, S, S), dropout_p=0.3)
    softmax = torch.softmax(q @ k.mT / E**0.5, -1)
    torch.testing.assert_close(weights, dropout_counter(softmax, 0.3, *KEY))


def test_nothing_but_the_inputs_is_kept(path) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(2))  # seen through a transposition, as in models
    leaves = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = attention_counter(KEY, *leaves, dropout_p=0.3)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in leaves}
    expected = attention_counter(KEY, *(x.contiguous() for x in leaves), dropout_p=0.3)
    assert torch.equal(out, expected)


def test_gradcheck(path) -> None:
    tensors = inputs(dtype=torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        return attention_counter(KEY, *tensors, MASKS["bool"], 0.3)

    assert torch.autograd.gradcheck(function, tensors)


def with_threads(num_threads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    # Long enough for two tiles, with a remainder.
    tensors = [torch.randn(2, 3, 601, 16, generator=generator) for _ in range(3)]
    torch.set_num_threads(num_threads)
    leaves = [x.requires_grad_() for x in tensors]
    out = attention_counter(KEY, *leaves, dropout_p=0.3)
    found = [out, *torch.autograd.grad(out, leaves, out.detach())]
    torch.set_num_threads(1)
    return found


def test_1_2_and_4_threads_give_the_same_bits(kernel) -> None:
    one = with_threads(1)
    for num_threads in (2, 4):
        assert all(map(torch.equal, with_threads(num_threads), one))


def test_kernel_and_plain_torch_agree(kernel, monkeypatch) -> None:
    found = with_threads(1)
    monkeypatch.setattr(attention, "_kernels", lambda *_: False)
    torch.testing.assert_close(found, with_threads(1))


def test_operators_are_declared_right(kernel) -> None:
    attention._kernels()
    operators = torch.ops.ipu_pipeline
    q, k, v = (x.detach() for x in inputs(2))
    numbers = (0.3, 2.0, 2**31, *KEY)
    hidden = ~MASKS["bool"].expand(2, H, L, S)
    blind = hidden.all(-1, keepdim=True)
    g = torch.randn(2, H, L, F)
    torch.library.opcheck(operators.attention_counter.default, (q, k, v, hidden, blind, *numbers))
    torch.library.opcheck(
        operators.attention_counter_backward.default, (g, q, k, v, None, None, *numbers)
    )


def test_what_is_left_to_torch() -> None:
    q, k, v = inputs(2)
    bias = MASKS["float"].clone().requires_grad_()
    assert attention_counter(KEY, q, k, v, bias, 0.3) is None
    assert attention_counter(KEY, q, k, v, MASKS["bool"].long(), 0.3) is None
    assert attention_counter(KEY, q, k, v, MASKS["bool"], 0.3, is_causal=True) is None
    assert attention_counter(KEY, q, k, v, dropout_p=1.5) is None
    assert attention_counter(KEY, q, k[:1], v[:1], dropout_p=0.3) is None
    assert attention_counter(KEY, q, k[:, :3], v[:, :3], dropout_p=0.3, enable_gqa=True) is None
    assert attention_counter(KEY, q[0, 0], k[0, 0], v[0, 0], dropout_p=0.3) is None
    assert attention_counter(KEY, q[:, :, :0], k, v, dropout_p=0.3) is None
    assert attention_counter(KEY, q, k.double(), v, dropout_p=0.3) is None
    with block_scope(1), pytest.raises(RuntimeError, match="Explicit attn_mask"):
        functional.scaled_dot_product_attention(q, k, v, MASKS["bool"], 0.3, is_causal=True)
    with block_scope(1):
        out = functional.scaled_dot_product_attention(q, k, v, bias, 0.3)
    out.sum().backward()
    assert bias.grad.shape == bias.shape
