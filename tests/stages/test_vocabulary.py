"""A softmax in parts, and the losses that are made of it: equal to torch's, in every option."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.chunked_loss import DeferredLogits
from ipu_pipeline.stages.vocabulary import SpreadLoss, SpreadTable, softmax_part, spread_table
from tests.backends.local.helpers import planned
from tests.tiny_models import TINY

TOKENS, HIDDEN, CLASSES = 6, 5, 11
BOUNDS = (0, 2, 8, 11)
Loss = Callable[[Any], Tensor]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in ((TOKENS, HIDDEN), (CLASSES, HIDDEN), (CLASSES,))]  # fmt: skip
    return made[0].requires_grad_(), nn.Parameter(made[1]), nn.Parameter(made[2])


def spread(
    loss: Loss, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss computed in parts, and the gradients of all three."""
    ranges = dict(enumerate(pairwise(BOUNDS)))
    calls = SpreadLoss(SpreadTable("head", weight, ranges, CLASSES))
    logits = DeferredLogits.of(x, weight, bias, softmax=calls)
    calls.collect(lambda: loss(logits))
    parts, kept = {}, {}
    for stage, (first, end) in ranges.items():
        found = [
            softmax_part(
                query,
                weight.detach()[first:end],
                None if query.bias_V is None else query.bias_V.detach()[first:end],
                first,
            )
            for query in calls.queries
        ]
        parts[stage], kept[stage] = [part for part, _ in found], [own for _, own in found]
    calls.combine(parts)
    total = loss(logits)
    total.backward()
    rows, of_bias = torch.zeros_like(weight), torch.zeros(CLASSES, dtype=weight.dtype)
    for stage, (first, end) in ranges.items():
        for one, given in zip(kept[stage], calls.given_back, strict=True):
            own_bias = None if bias is None else of_bias[first:end]
            one.add_gradients(given[stage], rows[first:end], own_bias)
    return total.detach(), [x.grad, rows, None if bias is None else of_bias]


def assert_equal(loss: Loss, *, bias: bool = True) -> None:
    x, weight, own_bias = inputs()
    given = own_bias if bias else None
    expected = loss(functional.linear(x, weight, given))
    wanted = torch.autograd.grad(expected, [x, weight, *([own_bias] * bias)])
    found, gradients = spread(loss, x, weight, given)
    torch.testing.assert_close(found, expected.detach())
    for gradient, other in zip([g for g in gradients if g is not None], wanted, strict=True):
        torch.testing.assert_close(gradient, other)


TARGET = torch.tensor([0, 7, -100, 10, 2, 7])
WEIGHTS = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)


def cross_entropy(logits: Any, **options: Any) -> Tensor:
    found = functional.cross_entropy(logits.view(-1, CLASSES), TARGET, **options)
    return found if found.ndim == 0 else (found * torch.arange(TOKENS)).sum()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy(reduction: str, smoothing: float, weights: Tensor | None) -> None:
    assert_equal(
        lambda logits: cross_entropy(
            logits, reduction=reduction, label_smoothing=smoothing, weight=weights
        ),
        bias=weights is None,
    )


LOSSES: dict[str, Loss] = {
    "another ignored class": lambda y: functional.cross_entropy(
        y, TARGET.abs() % CLASSES, ignore_index=7
    ),
    "a soft cap": lambda y: cross_entropy((y / 3.0).tanh() * 3.0, label_smoothing=0.2),
    "scaled, and a fixed bias": lambda y: cross_entropy(y * 0.5 + WEIGHTS),
    "a z-loss": lambda y: cross_entropy(y) + 0.1 * (y.logsumexp(-1) ** 2).mean(),
    "without the last token": lambda y: functional.cross_entropy(y[:-1], TARGET[1:]),
    "two targets": lambda y: cross_entropy(y) + functional.cross_entropy(y, TARGET.clamp(0)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_what_models_do_with_logits(name: str) -> None:
    assert_equal(LOSSES[name])


def test_the_target_of_a_sure_model_keeps_its_digits() -> None:
    x, weight, _ = inputs(torch.float32)
    sure = (40 * x).detach().requires_grad_()

    def loss(logits: Any) -> Tensor:
        return functional.cross_entropy(logits, TARGET)

    exact = sure.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(functional.linear(exact, weight.detach().double())), exact)
    found = spread(loss, sure, weight, None)[1][0]
    assert found is not None
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)


def test_tokens_that_do_not_count_have_no_gradient() -> None:
    """A microbatch may have no labels: its mean is 0 / 0, and counts nothing."""
    x, weight, _ = inputs()
    nothing = torch.full((TOKENS,), -100)
    found, gradients = spread(
        lambda y: functional.cross_entropy(y, nothing, label_smoothing=0.1), x, weight, None
    )
    assert found.isnan()
    for gradient in gradients[:2]:
        assert gradient is not None
        assert not gradient.any()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda y: y.log_softmax(-1).sum(), "uses log_softmax of the logits, which needs them as"),
        (lambda y: torch.stack([y, y]).sum(), "the logits are needed as a whole"),
        (lambda _: torch.zeros(()), "computes no cross entropy of what block 'head' projects"),
    ],
)
def test_other_losses_are_refused(loss: Loss, message: str) -> None:
    x, weight, _ = inputs()
    with pytest.raises(LoweringError, match=message):
        spread(loss, x, weight, None)


def test_a_computed_bias_is_refused() -> None:
    x, weight, bias = inputs()
    twice: Any = bias * 2
    with pytest.raises(LoweringError, match="bias of the output projection is computed"):
        spread(cross_entropy, x, weight, twice)


def test_a_target_that_is_no_class() -> None:
    x, weight, _ = inputs()
    with pytest.raises(IndexError, match="target 11 is out of bounds for 11 classes"):
        spread(lambda y: functional.cross_entropy(y, TARGET.clamp(0) + 1), x, weight, None)


def test_the_last_stage_ends_with_head_and_loss() -> None:
    plan = planned("gpt2-lm", num_stages=2, vocabulary="even")
    model = TINY["gpt2-lm"].build()[0]
    program: Any = SimpleNamespace(name="lm_head")
    with pytest.raises(LoweringError, match="does not end with block 'lm_head' and the loss"):
        spread_table(model, plan, [program])
    loss: Any = SimpleNamespace(name="loss", changing={"x": 1}, module=nn.Identity())
    with pytest.raises(LoweringError, match="loss changes tensors of the model"):
        spread_table(model, plan, [program, loss])
    loss.changing, loss.module.runs_live = {}, True
    with pytest.raises(LoweringError, match="loss is a trainer's own, and where"):
        spread_table(model, plan, [program, loss])
