"""Deferred logits: what they are, what is done to the hidden states, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.chunked_loss import DeferredLogits

pytestmark = pytest.mark.filterwarnings("ignore:the C.. kernels are not used")
CLASSES, HIDDEN = 11, 4


def operands(*, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    return (
        torch.randn(2, 3, HIDDEN, requires_grad=True),
        torch.randn(CLASSES, HIDDEN, requires_grad=True),
        torch.randn(CLASSES, requires_grad=True) if bias else None,
    )


def deferred(*of: Any) -> DeferredLogits:
    return DeferredLogits.of(*of, factor=4, hold_gradients=True)


def test_it_describes_the_logits() -> None:
    logits = deferred(*operands())
    assert isinstance(logits, Tensor)
    assert logits.shape == logits.size() == (2, 3, CLASSES)
    assert (logits.ndim, logits.dim(), len(logits), logits.numel()) == (3, 3, 2, 6 * CLASSES)
    assert logits.dtype == torch.float32
    assert logits.requires_grad
    assert logits.is_floating_point()
    assert logits.device.type == "cpu"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert deferred(*operands()).dtype == torch.bfloat16


KEPT: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda y: y.view(-1, CLASSES),
    "view of a shape": lambda y: y.view((3, -1, CLASSES)),
    "reshape": lambda y: torch.reshape(y, (6, -1)),
    "flatten": lambda y: y.flatten(0, -2),
    "float": lambda y: y.float(),
    "to": lambda y: y.to(torch.float32).to("cpu").to(device="cpu", non_blocking=True),
    "contiguous": lambda y: y.contiguous(),
    "all but the last": lambda y: y[..., :-1, :],
    "last": lambda y: y[:, -1],
    "mask": lambda y: y[torch.tensor([[True, False, True], [False, True, True]])],
    "rows": lambda y: y[torch.tensor([1, 0, 1]), torch.tensor([0, 2, 2])],
    "new axis": lambda y: y[:, None, 1:, :],
    "scale": lambda y: 2 * y / 3,
    "cap": lambda y: torch.tanh(y / 3.0) * 3.0,
    "add": lambda y: y + torch.arange(CLASSES).float(),
    "add twice": lambda y: torch.ones(1, 1, CLASSES) + y.add(torch.ones(CLASSES)),
}
COMPUTED: dict[str, Callable[[Tensor], Any]] = {
    "other view": lambda y: y.view(-1),
    "view as numbers": lambda y: y.view(torch.int32),
    "down": lambda y: y.to(torch.bfloat16),
    "double": lambda y: y.to(torch.float64),
    "like another": lambda y: y.to(torch.ones(1)),
    "first classes": lambda y: y[..., :5],
    "one class": lambda y: y[:, :, 2],
    "classes by mask": lambda y: y[torch.ones(2, 3, CLASSES, dtype=torch.bool)],
    "new last axis": lambda y: y[..., None],
    "a list": lambda y: y[[0, 1]],
    "add rows": lambda y: y + torch.ones(3, CLASSES),
    "add a part": lambda y: y.add(torch.ones(CLASSES), alpha=2),
    "add itself": lambda y: y + y,
    "add to capped": lambda y: y.tanh() + torch.ones(CLASSES),
    "cast capped": lambda y: y.tanh().to(torch.float64),
    "by tensor": lambda y: y * torch.full((), 2.0),
    "rounded": lambda y: torch.div(y, 2.0, rounding_mode="floor"),
    "softmax": lambda y: y.softmax(-1),
    "permuted": lambda y: y.permute(0, 2, 1),
    "add a part of it": lambda y: torch.ones(CLASSES).add(y, alpha=2),
    "joined": lambda y: torch.cat([y, y]),
    "written": lambda y: y.clamp_(max=1.0),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [*KEPT, *COMPUTED])
def test_every_value_and_gradient_is_that_of_the_logits(name: str, bias: bool) -> None:
    function = {**KEPT, **COMPUTED}[name]
    plain = operands(bias=bias)
    expected = function(functional.linear(*plain) * 1.0)
    lazy = operands(bias=bias)
    found = function(deferred(*lazy))
    assert isinstance(found, DeferredLogits) == (name in KEPT)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    value = found.materialised() if name in KEPT else found
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    if not expected.is_floating_point():
        return
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    (value * weights).sum().backward()
    for mine, theirs in zip(lazy, plain, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capped", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_takes_every_option(reduction: str, capped: bool) -> None:
    target = torch.tensor([1, 5, 10, 7, 5, 0])
    class_weight = torch.linspace(0.5, 1.5, CLASSES)
    results = []
    for make in (functional.linear, deferred):
        of = operands()
        logits = make(*of).view(-1, CLASSES)
        if capped:
            logits = torch.tanh(logits / 2.0) * 2.0
        loss = functional.cross_entropy(
            logits, target, class_weight, ignore_index=5, reduction=reduction, label_smoothing=0.3
        )
        loss.sum().backward()
        results.append((loss, *(t.grad for t in of)))
        assert make is functional.linear or logits._computed is None
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capped", [True, False])
def test_no_tokens_give_no_loss(capped: bool) -> None:
    x, weight, bias = operands()
    logits = deferred(x[:0], weight, bias).view(-1, CLASSES)
    logits = logits.tanh() if capped else logits
    target = torch.zeros(0, dtype=torch.int64)
    assert functional.cross_entropy(logits, target, reduction="none").shape == (0,)


def test_changed_inputs_are_refused() -> None:
    x, weight, bias = operands()
    hidden = x * 1.0
    logits = deferred(hidden, weight, bias)
    hidden.add_(1.0)
    with pytest.raises(LoweringError, match="changed in place before its logits are used"):
        logits.sum()


def test_hidden_writes_are_refused() -> None:
    logits = deferred(*operands())
    assert logits.view(-1, CLASSES).shape == (6, CLASSES)
    for write in (
        lambda: logits.mul_(2.0),
        lambda: logits.__setitem__(0, 1.0),
        lambda: logits.__iadd__(1.0),
        lambda: functional.relu(logits, inplace=True),
    ):
        with pytest.raises(LoweringError, match="into the logits of a serialized block of which"):
            write()


def test_reads_without_gradients_are_refused() -> None:
    logits = deferred(*operands())
    with torch.no_grad(), pytest.raises(LoweringError, match="where gradients are switched off"):
        logits.argmax(-1)


def test_compiled_code_is_refused() -> None:
    logits = deferred(*operands())
    with (
        torch._C.DisableTorchFunctionSubclass(),
        pytest.raises(LoweringError, match=r"reached aten.sum.default from compiled code"),
    ):
        torch.sum(logits)
