from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ipu_pipeline.ops import extension
from ipu_pipeline.ops.linear_cross_entropy import _kernels, linear_cross_entropy
from tests.later import in_turn

NUM_CLASSES = 50
# Relative to the largest entry; the reference is computed in float64 from the same operands.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
pytestmark = pytest.mark.filterwarnings("ignore:the C\\+\\+ kernels are not used:RuntimeWarning")


def operands(
    dtype: torch.dtype = torch.float64, tokens: int = 33, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, target with one ignored token, bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, 16), (NUM_CLASSES, 16), (NUM_CLASSES,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    target = torch.randint(NUM_CLASSES, (tokens,), generator=generator)
    target[3:4] = -100
    return x.requires_grad_(), weight.requires_grad_(), target, bias.requires_grad_()


def class_weights() -> Tensor:
    return torch.linspace(0.2, 2.0, NUM_CLASSES, dtype=torch.float64)


def reference(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, **options: Any
) -> Tensor:
    logits = functional.linear(*[t.double() if t is not None else t for t in (x, weight, bias)])
    class_weight = options.pop("class_weight_V", None)
    if class_weight is not None:
        class_weight = class_weight.double()
    for ours in ("num_slices", "hold_gradients"):
        options.pop(ours, None)
    return functional.cross_entropy(logits, target, weight=class_weight, **options)


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    largest = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * largest
    )


def compare(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, **options: Any) -> None:
    leaves = [each for each in (x, weight, bias) if each is not None]
    got = linear_cross_entropy(x, weight, target, bias, **options)
    expected = reference(x, weight, target, bias, **options)
    assert got.dtype is (torch.float64 if x.dtype is torch.float64 else torch.float32)
    assert got.shape == expected.shape
    assert_near(got, expected, x.dtype)
    # Not near 0: float16 has few digits for small gradients.
    upstream = torch.linspace(0.5, 1, max(1, expected.numel()), dtype=expected.dtype)
    upstream = upstream[: expected.numel()].view_as(expected)
    ours = torch.autograd.grad(got, leaves, upstream.to(got.dtype))
    for leaf, mine, theirs in zip(
        leaves, ours, torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        assert mine.dtype is leaf.dtype
        assert_near(mine, theirs, x.dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("hold", [True, False])
def test_loss_and_gradients(dtype: torch.dtype, reduction: str, hold: bool) -> None:
    x, weight, target, bias = operands(dtype)
    for smoothing in (0.0, 0.2):
        for class_weight in (None, class_weights().to(dtype)):
            compare(
                x, weight, target, bias, reduction=reduction, hold_gradients=hold, num_slices=3,
                label_smoothing=smoothing, class_weight_V=class_weight,
            )  # fmt: skip


@pytest.mark.parametrize("num_slices", [1, 2, 5, 33, 100])
@pytest.mark.parametrize("hold", [True, False])
def test_number_of_slices(num_slices: int, hold: bool) -> None:
    x, weight, target, _ = operands()
    compare(x, weight, target, None, num_slices=num_slices, hold_gradients=hold)


@pytest.mark.parametrize(("reduction", "hold"), in_turn(["mean", "none"], [True, False]))
def test_gradients_against_differences(reduction: str, hold: bool) -> None:
    x, weight, target, bias = operands(tokens=7)
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: linear_cross_entropy(
            x, weight, target, bias, reduction=reduction, hold_gradients=hold, num_slices=2,
            class_weight_V=class_weights(), label_smoothing=0.1,
        ),
        (x, weight, bias),
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("class_weight", [None, class_weights()])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_token_ignored(reduction: str, class_weight: Tensor, smoothing: float) -> None:
    x, weight, target, _ = operands()
    options = {"reduction": reduction, "class_weight_V": class_weight, "ignore_index": 7}
    target.fill_(7)
    got = linear_cross_entropy(x, weight, target, label_smoothing=smoothing, **options)
    expected = reference(x, weight, target, None, label_smoothing=smoothing, **options)
    torch.testing.assert_close(got, expected, equal_nan=True)
    got.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert not x.grad.any()
    assert not weight.grad.any()


def test_a_class_that_is_ignored() -> None:
    x, weight, target, bias = operands()
    target = target.clamp(min=0)
    compare(x, weight, target, bias, ignore_index=int(target[0]))


def test_impossible_and_huge_logits() -> None:
    x, weight, target, bias = operands(torch.float32)
    target.fill_(4)
    with torch.no_grad():
        weight.mul_(20)
        bias[7] = -torch.inf
    compare(x, weight, target, bias)
    with torch.no_grad():
        bias[9] = torch.nan
    assert linear_cross_entropy(x, weight, target, bias).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_operands(dtype: torch.dtype) -> None:
    x, weight, target, bias = operands(dtype)
    x = x.detach().t().contiguous().t().requires_grad_()
    weight = torch.stack([weight.detach()] * 2, -1)[..., 0].requires_grad_()
    target = torch.stack([target] * 2, -1)[:, 0]
    bias = torch.stack([bias.detach()] * 2, -1)[:, 0].requires_grad_()
    class_weight = torch.stack([class_weights()] * 2, -1)[:, 0]
    for each in (x, weight, target, bias, class_weight):
        assert not each.is_contiguous()
    compare(x, weight, target, bias, class_weight_V=class_weight, num_slices=2)
    compare(x, weight, target, bias, class_weight_V=class_weight, hold_gradients=False)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("hold", [True, False])
def test_without_tokens(reduction: str, hold: bool) -> None:
    x, weight, target, bias = operands(tokens=0)
    got = linear_cross_entropy(x, weight, target, bias, reduction=reduction, hold_gradients=hold)
    expected = reference(x, weight, target, bias, reduction=reduction)
    torch.testing.assert_close(got, expected, equal_nan=True)
    got.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("hold", [True, False])
def test_only_the_wanted_gradients(wanted: tuple[int, ...], hold: bool) -> None:
    x, weight, target, bias = operands()
    leaves = [
        each.requires_grad_(bool(w)) for each, w in zip((x, weight, bias), wanted, strict=True)
    ]
    loss = linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], hold_gradients=hold)
    if any(wanted):
        compare_grads = torch.autograd.grad(loss, [each for each in leaves if each.requires_grad])
        assert all(each.any() for each in compare_grads)
    assert loss.requires_grad is any(wanted)


@pytest.mark.parametrize("hold", [True, False])
def test_backward_twice(hold: bool) -> None:
    x, weight, target, bias = operands()
    loss = linear_cross_entropy(x, weight, target, bias, hold_gradients=hold)
    first = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (x, weight, bias), retain_graph=False)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(3 * one, other)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, (x, weight, bias))


def test_the_held_gradient_becomes_the_weights_own() -> None:
    x, weight, target, _ = operands()
    loss = linear_cross_entropy(x, weight, target)
    held = loss.grad_fn.held[1].data_ptr()
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == held


def test_evaluation_computes_no_gradients() -> None:
    x, weight, target, _ = operands()
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, target)
    assert not loss.requires_grad
    assert_near(loss, reference(x, weight, target, None), x.dtype)


@pytest.mark.parametrize("hold", [True, False])
def test_float16_gradients_survive_under_a_loss_scale(hold: bool) -> None:
    x, weight, target, bias = operands(torch.float16)
    loss = linear_cross_entropy(x, weight, target, bias, hold_gradients=hold) * 1e-6
    got = torch.autograd.grad(loss * 65536, (x, weight))
    expected = torch.autograd.grad(reference(x, weight, target, bias) * 0.065536, (x, weight))
    for ours, theirs in zip(got, expected, strict=True):
        assert_near(ours, theirs, torch.float16)


@pytest.mark.parametrize("hold", [True, False])
def test_autocast_computes_as_linear_does(hold: bool) -> None:
    x, weight, target, bias = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target, bias, hold_gradients=hold)
        got = torch.autograd.grad(loss, (x, weight, bias))
    assert loss.dtype is torch.float32
    expected = reference(x, weight, target, bias)
    assert abs(loss - expected) > 1e-6  # it did round
    for ours, theirs in zip(
        (loss, *got), (expected, *torch.autograd.grad(expected, (x, weight, bias))), strict=True
    ):
        assert ours.dtype is torch.float32
        assert_near(ours, theirs, torch.bfloat16)


def test_autocast_leaves_float64_alone() -> None:
    x, weight, target, bias = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(x, weight, target, bias)


def test_refused_operands() -> None:
    x, weight, target, bias = operands()
    with pytest.raises(ValueError, match=r"x \(33, 16\) and weight \(50, 15\) must be N x H"):
        linear_cross_entropy(x, weight[:, 1:], target)
    with pytest.raises(ValueError, match="flatten the tokens to N rows"):
        linear_cross_entropy(x.unsqueeze(0), weight, target)
    with pytest.raises(
        ValueError, match=r"x, weight and bias are torch.float32, torch.float64; use"
    ):
        linear_cross_entropy(x.float(), weight, target)
    with pytest.raises(ValueError, match=r"torch.float64, torch.float32; use float32, float64"):
        linear_cross_entropy(x, weight, target, bias.float())
    with pytest.raises(ValueError, match=r"target is torch.int32 \(33,\), needed is int64 \(33,\)"):
        linear_cross_entropy(x, weight, target.int())
    with pytest.raises(ValueError, match="one class per token"):
        linear_cross_entropy(x, weight, target[1:])
    with pytest.raises(ValueError, match=r"bias \(49,\) must have one entry for each of the 50"):
        linear_cross_entropy(x, weight, target, bias[1:])
    with pytest.raises(ValueError, match=r"class_weight \(1,\) must have one entry"):
        linear_cross_entropy(x, weight, target, class_weight_V=bias[:1])


def test_refused_options() -> None:
    x, weight, target, _ = operands()
    with pytest.raises(ValueError, match="reduction 'max' is unknown; use one of mean"):
        linear_cross_entropy(x, weight, target, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"label_smoothing 1\.5 must be between 0 and 1"):
        linear_cross_entropy(x, weight, target, label_smoothing=1.5)
    with pytest.raises(ValueError, match="num_slices 0 must be at least 1"):
        linear_cross_entropy(x, weight, target, num_slices=0)


@pytest.mark.parametrize("wrong", [-1, NUM_CLASSES])
def test_targets_out_of_range(wrong: int) -> None:
    x, weight, target, _ = operands()
    target[5] = wrong
    with pytest.raises(IndexError, match=f"target {wrong} is out of bounds for 50 classes"):
        linear_cross_entropy(x, weight, target)


# ---------------------------------------------------------------- the C++ operator itself
needs_kernels = pytest.mark.skipif(
    not extension.state().usable, reason="the C++ kernels are not built, or switched off"
)


def operator(*arguments: Any) -> tuple[Tensor, ...]:
    assert _kernels()  # registers the fake kernel
    return torch.ops.ipu_pipeline.linear_cross_entropy(*arguments)


def many_tiles(dtype: torch.dtype, tokens: int = 300) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, target, bias; classes fill two tiles and a part of a third."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((tokens, 64), (2500, 64), (2500,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    target = torch.randint(2500, (tokens,), generator=generator)
    target[::7] = -100
    return x.requires_grad_(), weight.mul_(0.2).requires_grad_(), target, bias.requires_grad_()


@needs_kernels
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("scaled", [False, True])
def test_operator_passes_torchs_own_checks(dtype: torch.dtype, scaled: bool) -> None:
    x, weight, target, bias = (each.detach() for each in operands(dtype))
    scale = torch.rand(33, dtype=torch.float64).to(x.dtype) if scaled else None
    assert _kernels()
    for needs in ((True, True, True), (True, False, False)):
        torch.library.opcheck(
            torch.ops.ipu_pipeline.linear_cross_entropy.default,
            (x, weight, target, bias, class_weights(), scale, -100, 0.1, 16, *needs),
        )


@needs_kernels
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_1_2_and_4_threads_give_the_same_bits(dtype: torch.dtype, tokens: int) -> None:
    x, weight, target, bias = many_tiles(dtype, tokens)
    target[0] = 3
    found = []
    for num_threads in (1, 2, 4):
        torch.set_num_threads(num_threads)
        try:
            loss = linear_cross_entropy(x, weight, target, bias, num_slices=2, label_smoothing=0.1)
            found.append((loss, *torch.autograd.grad(loss, (x, weight, bias))))
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num_slices", [1, 4])
def test_several_tiles_of_classes(dtype: torch.dtype, num_slices: int) -> None:
    x, weight, target, bias = many_tiles(dtype)
    weights = torch.linspace(0.5, 1.5, 2500)
    compare(x, weight, target, bias, num_slices=num_slices)
    compare(x, weight, target, None, label_smoothing=0.1, class_weight_V=weights)


@needs_kernels
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 1.0), (torch.float16, 1.0)])
def test_half_precision_is_as_good_as_torchs(dtype: torch.dtype, allowed: float) -> None:
    x, weight, target, _ = many_tiles(dtype)
    target.clamp_(min=0)

    def errors(loss: Tensor) -> list[float]:
        found = torch.autograd.grad(loss, (x, weight))
        pairs = zip((loss.detach(), *found), (exact.detach(), *exact_gradients), strict=True)
        return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]

    leaves = [each.detach().double().requires_grad_() for each in (x, weight)]
    exact = functional.cross_entropy(functional.linear(*leaves), target, reduction="sum") / 300
    exact_gradients = torch.autograd.grad(exact, leaves)
    ours = errors(linear_cross_entropy(x, weight, target, num_slices=4))
    torchs = errors(functional.cross_entropy(functional.linear(x, weight), target))
    assert all(a <= allowed * b for a, b in zip(ours, torchs, strict=True)), (ours, torchs)


@needs_kernels
def test_every_16_bit_number_survives_as_a_logit() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        # One class per number; with x = 1 the logits are the weights, and the loss of a token
        # whose only other logit is its target is log(1 + exp(z)).
        numbers = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
        numbers = numbers[numbers.isfinite() & (numbers.abs() <= 80)]
        x = torch.stack([numbers, torch.zeros_like(numbers)], -1)
        weight = torch.eye(2, dtype=dtype)
        target = torch.ones(len(numbers), dtype=torch.int64)
        losses = linear_cross_entropy(x, weight, target, reduction="none")
        expected = functional.softplus(numbers.double())
        torch.testing.assert_close(losses.double(), expected, rtol=3e-7, atol=1e-7)


@needs_kernels
def test_gradients_follow_the_exponential_down_to_its_end() -> None:
    z = torch.linspace(-80, 0, 40_001)
    weight = torch.stack([z, torch.zeros_like(z)]).t().contiguous()
    x = torch.tensor([[1.0, 0.0]])
    target = torch.tensor([40_000])
    ones = torch.ones(1)
    arguments = (x, weight, target, None, None, ones, -100, 0.0, 1, False, True, False)
    gradient = operator(*arguments)[2][:-1, 0].double()
    expected = z.double().softmax(0)[:-1]
    # The rounding of the log-sum-exp, about 6, is part of it: half a unit of its last place.
    assert ((gradient - expected).abs() / expected).max() < 8e-6


@needs_kernels
def test_operator_refuses_what_it_cannot_read() -> None:
    x, weight, target, bias = (each.detach() for each in operands(torch.float32))
    rest = (-100, 0.0, 16, True, True, True)
    with pytest.raises(ValueError, match=r"x \[33, 16\] and weight \[50, 15\] must be N x H"):
        operator(x, weight[:, 1:], target, None, None, None, *rest)
    with pytest.raises(ValueError, match=r"needed are 33 int64 targets, not \[32\] of Long"):
        operator(x, weight, target[1:], None, None, None, *rest)
    with pytest.raises(ValueError, match=r"slices of at least 1 token, not 0"):
        operator(x, weight, target, None, None, None, -100, 0.0, 0, True, True, True)
    with pytest.raises(ValueError, match="need one entry for each of 50 classes"):
        operator(x, weight, target, bias[1:], None, None, *rest)
    with pytest.raises(ValueError, match="the scale needs one entry for each of 33 tokens"):
        operator(x, weight, target, None, None, x[0], *rest)
    with pytest.raises(ValueError, match="x is Long; use float32, float64, bfloat16 or float16"):
        operator(x.long(), weight.long(), target, None, None, None, *rest)
    target[5] = 50
    with pytest.raises(IndexError, match="target 50 is out of bounds for 50 classes"):
        operator(x, weight, target, None, None, None, *rest)
