"""Linear layers through the kernels against torch's, and their gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ipu_pipeline.ops import extension, linear
from ipu_pipeline.ops.linear import adding_to_grad, casts_of_one_step, fast_addmm, fast_linear
from ipu_pipeline.ops.random import block_scope
from tests.later import every_second

M, K, N = 6, 5, 4

needs_kernels = pytest.mark.skipif(not extension.state().usable, reason=extension.state().detail)


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take small layers too, wherever MKL is as fast."""
    if not extension.state().usable:
        pytest.skip(extension.state().detail)
    monkeypatch.setattr(linear, "_LEAST_MULTIPLICATIONS", 0)
    monkeypatch.setattr(linear, "onednn_products", lambda: True)


def layer(m: int = M, k: int = K, n: int = N, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return x (2, m/2, k), weight (n, k), bias (n) that want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, m // 2, k), (n, k), (n,)]
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


def gradients(function: Any, tensors: list[Tensor], autocast: bool = False) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(*tensors)
    assert out is not None
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


@pytest.mark.parametrize("sizes", [(6, 5, 4), (2, 1, 1), (256, 256, 128)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_torch(sizes: tuple[int, int, int], with_bias: bool, every_size: None) -> None:
    tensors = layer(*sizes)[: 3 if with_bias else 2]
    expected = gradients(functional.linear, [t.double().detach().requires_grad_() for t in tensors])
    for found, right in zip(gradients(fast_linear, tensors), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - right).abs().max() <= 1e-6 * right.abs().max() * sizes[1] ** 0.5


def test_equals_torch_under_autocast(every_size: None) -> None:
    tensors = layer(64, 32, 16)
    expected = gradients(functional.linear, tensors, autocast=True)
    for found, right in zip(gradients(fast_linear, tensors, autocast=True), expected, strict=True):
        assert found.dtype == right.dtype
        assert torch.allclose(found.float(), right.float(), rtol=2e-2, atol=2e-2)


def test_widened_products_are_rounded_once(every_size: None) -> None:
    with linear._switched("set_widens_bfloat16", wish=True, changes=True):
        check_rounding()


def check_rounding() -> None:
    """Compare with float32 products of rounded numbers."""
    tensors = layer(64, 32, 16)
    exact = [t.detach().bfloat16().float().requires_grad_() for t in tensors]
    found, expected = gradients(fast_linear, tensors, autocast=True), functional.linear(*exact)
    # Libraries add in another order: at most one step of bfloat16.
    assert torch.allclose(found[0].float(), expected, rtol=2**-7, atol=1e-6)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    right = torch.autograd.grad(expected, exact, upstream.float())
    for one, other in zip(found[1:], right, strict=True):
        assert torch.allclose(one, other, rtol=1e-2, atol=1e-2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        evaluated = fast_linear(*tensors)
    assert evaluated is not None
    assert torch.equal(evaluated, found[0])


def test_strided_and_expanded_operands(every_size: None) -> None:
    x = torch.randn(K, 3, 8)[:, :, ::2].permute(1, 2, 0).requires_grad_()
    weight = torch.randn(K, N).t().requires_grad_()
    out = fast_linear(x, weight)
    assert out is not None
    out.sum().backward()  # its gradient is one number, expanded
    assert torch.allclose(out, functional.linear(x, weight), atol=1e-6)
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.detach().sum(0).expand_as(x), atol=1e-5)


def test_empty_input(every_size: None) -> None:
    x, weight = torch.empty(0, 3, K, requires_grad=True), torch.randn(N, K, requires_grad=True)
    out, x_grad, weight_grad = gradients(fast_linear, [x, weight])
    assert out.shape == (0, 3, N)
    assert x_grad.shape == x.shape
    assert not weight_grad.any()


@needs_kernels
def test_operators_are_well_described() -> None:
    linear._kernels()
    x, weight, bias = (tensor.detach() for tensor in layer())
    grad = torch.randn(2, M // 2, N)
    forward = torch.ops.ipu_pipeline.linear_forward
    backward = torch.ops.ipu_pipeline.linear_backward
    for transposed, stored in ((False, weight), (True, weight.t().contiguous())):
        torch.library.opcheck(forward, (x, stored, bias, transposed))
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(backward, (grad, x, stored, transposed, *needs))


def test_gradients_in_double(every_size: None) -> None:
    tensors = layer(dtype=torch.float64)
    assert torch.autograd.gradcheck(torch.ops.ipu_pipeline.linear, tensors)


def test_second_derivatives_are_refused(every_size: None) -> None:
    x, weight, bias = layer()
    out = fast_linear(x, weight, bias)
    assert out is not None
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("autocast", [False, True])
def test_any_number_of_threads_gives_the_same_bits(autocast: bool, every_size: None) -> None:
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(gradients(fast_linear, layer(256, 128, 64), autocast))
    torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_calls_that_torch_takes(every_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "widens_bfloat16", lambda: False)
    x, weight, bias = layer()
    assert fast_linear(x.double(), weight.double()) is None
    assert fast_linear(x, weight, bias.double()) is None
    assert fast_linear(x, weight[:, :-1]) is None  # torch says what is wrong
    assert fast_linear(x, torch.randn(N + K).as_strided((N, K), (1, 1))) is None
    assert fast_linear(x.to("meta"), weight.to("meta")) is None
    with torch.autocast("cpu", torch.float16):
        assert fast_linear(x, weight, bias) is None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fast_linear(x, weight, bias) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fast_linear(x.double(), weight) is None
    monkeypatch.setattr(linear, "_LEAST_MULTIPLICATIONS", M * K * N + 1)
    assert fast_linear(x, weight, bias) is None


def test_without_kernels_torch_takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_LEAST_MULTIPLICATIONS", 0)
    monkeypatch.setattr(linear, "_kernels", lambda *_: False)
    assert fast_linear(*layer()) is None


def test_addmm(every_size: None) -> None:
    x, weight, bias = layer()
    bias, rows, weight = (t.detach().requires_grad_() for t in (bias, x.reshape(-1, K), weight.t()))
    weight = weight.detach().contiguous().requires_grad_()
    expected = gradients(torch.addmm, [bias, rows, weight])
    for found, right in zip(gradients(fast_addmm, [bias, rows, weight]), expected, strict=True):
        assert torch.allclose(found, right, atol=1e-5)
        assert found.stride() == right.stride()
    assert fast_addmm(bias, rows, weight, beta=2) is None
    assert fast_addmm(bias, rows, weight, alpha=2) is None
    assert fast_addmm(expected[0], rows, weight) is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("widens", [False, True])
def test_adding_to_grad_gives_autograds_sum(autocast: bool, widens: bool, every_size: None) -> None:
    with linear._switched("set_widens_bfloat16", wish=widens, changes=True):
        check_sums(autocast)


def check_sums(autocast: bool) -> None:
    """Compare what is added to ``.grad`` with what autograd adds up."""
    sums = []
    for scope in (adding_to_grad, lambda: torch.enable_grad()):
        x, weight, bias = layer(64, 32, 16)
        other = torch.randn(16, 7, generator=torch.Generator().manual_seed(3)).requires_grad_()
        end = torch.zeros(7, requires_grad=True)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                middle = fast_linear(x, weight, bias)
                assert middle is not None
                out = fast_addmm(end, middle.flatten(0, 1), other)
            assert out is not None
            with scope():
                out.float().square().sum().backward()
        sums.append([tensor.grad for tensor in (x, weight, bias, other, end)])
    for found, right in zip(*sums, strict=True):
        assert found is not None
        assert right is not None
        assert torch.allclose(found, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


def test_hooks_still_see_the_gradient(every_size: None) -> None:
    x, weight, bias = layer()
    seen: list[Tensor] = []
    weight.grad = torch.zeros_like(weight)
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter))
    other = torch.randn_like(weight).requires_grad_()
    other.grad = torch.zeros_like(other)
    other.register_hook(seen.append)
    for parameter in (weight, other):
        out = fast_linear(x, parameter, bias)
        assert out is not None
        with adding_to_grad():
            out.sum().backward()
    assert len(seen) == 2


def test_a_weight_is_cast_again_when_it_has_changed(every_size: None) -> None:
    x, weight, _ = layer()
    with casts_of_one_step(), torch.autocast("cpu", torch.bfloat16):
        first = fast_linear(x, weight)
        cast = linear._casts[weight][1]
        fast_linear(x, weight)
        assert linear._casts[weight][1] is cast
        with torch.no_grad():
            weight.mul_(2)
        second = fast_linear(x, weight)
    assert first is not None
    assert second is not None
    assert torch.equal(second, 2 * first)
    assert weight not in linear._casts


def test_a_blocks_layers_come_here(every_size: None) -> None:
    block = nn.Sequential(nn.Linear(K, N), nn.Dropout(0.5))
    x = torch.randn(3, K)
    with block_scope("key", 1):
        found = block(x)
    with block_scope("key", 1):
        again = block(x)
    assert "Linear" in str(found.grad_fn.next_functions[0][0].name())
    assert torch.equal(found, again)


@needs_kernels
def test_results_can_be_made_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.ops.ipu_pipeline.set_onednn_products(True)
    x, weight, bias = (tensor.detach() for tensor in layer(256, 256, 128))
    with linear.torchs_products():
        assert not linear.onednn_products()
        assert fast_linear(x, weight, bias) is None
        with linear.torchs_products():
            pass
        assert not linear.onednn_products()
    assert linear.onednn_products()
    assert torch.ops.ipu_pipeline.set_onednn_products(before)


@needs_kernels
@pytest.mark.parametrize(("wish", "chosen"), every_second([("mkl", False), ("onednn", True)]))
def test_the_environment_chooses_the_library(wish: str, chosen: bool) -> None:
    code = "from ipu_pipeline.ops import linear as l; print(l.onednn_products())"
    environment = {**os.environ, linear.SWITCH: wish}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(chosen)]


@needs_kernels
def test_an_unknown_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(linear.SWITCH, "blis")
    with pytest.raises(linear.PipelineError, match="IPU_PIPELINE_MATMUL=blis is unknown"):
        linear._kernels.__wrapped__()
