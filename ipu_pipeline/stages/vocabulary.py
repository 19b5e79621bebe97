"""The softmax over a vocabulary whose rows are spread over stages, and its exact cross entropy.

The last stage runs its loss twice. In the forward pass it is run to see which softmax it needs: of
which hidden states, with which classes as targets. Every stage with rows computes its part
(:func:`softmax_part`): the largest logit, the sum of exponentials, the logit of the target, and the
hidden states' gradient as far as it is known without the other parts. In the backward pass the loss
is run again, now with the parts combined; its gradient for the sums is what the stages need for
their rows (:meth:`KeptSoftmax.add_gradients`). No stage has the logits of all classes.

The target's own exponential is kept apart: ``softmax - 1`` would lose digits in a product.

Source: Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism, MLSys 2025
(arXiv 2411.05288), algorithm 2.

Axes: N tokens, H hidden size, V classes, R those of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.programs import Program
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ops.autocast import no_autocast
from ipu_pipeline.ops.linear_cross_entropy import LossOptions, Pointwise, apply, check_targets
from ipu_pipeline.planner.options.vocabulary import spread_head
from ipu_pipeline.stages.chunked_loss import DeferredLogits

NO_CLASS = -1


@dataclass(frozen=True)
class SpreadTable:
    """The table of the output projection of a spread vocabulary, and its rows by stage.

    Attributes:
        block: Name of the block that projects.
        parameter: The table.
        rows: First row and the one behind the last of every stage that holds some.
        size: Number of rows of the whole table.
    """

    block: str
    parameter: nn.Parameter
    rows: Mapping[int, tuple[int, int]]
    size: int


@dataclass(frozen=True)
class SoftmaxQuery:
    """Which softmax a loss needs.

    Attributes:
        x_NH: Hidden states in the dtype of the product, without graph.
        bias_V: Bias of the projection, a parameter; or None.
        pointwise: What is done to every logit.
        target_N: Class of every token whose logit is needed, or :data:`NO_CLASS`.
        summed_V: Weights of the classes in a sum over all logits; None: there is none.
        needs_x: Whether the hidden states have a gradient.
    """

    x_NH: Tensor
    bias_V: nn.Parameter | None
    pointwise: Pointwise
    target_N: Tensor
    summed_V: Tensor | None
    needs_x: bool


@dataclass(frozen=True)
class SoftmaxPart:
    """What one stage tells of its rows.

    Attributes:
        max_N: Largest logit.
        sum_N: Sum of the exponentials, each logit less the largest.
        logit_N: Logit of the target; 0 where another stage has it.
        exp_N: Its exponential; likewise.
        total_N: Weighted sum of all logits; None where nobody needs it.
        others_NH: Gradient for the hidden states of the exponentials but the target's.
        own_NH: Gradient for them of the target's logit; both None if there is no gradient.
        total_NH: Gradient for them of the weighted sum.
    """

    max_N: Tensor
    sum_N: Tensor
    logit_N: Tensor
    exp_N: Tensor
    total_N: Tensor | None
    others_NH: Tensor | None
    own_NH: Tensor | None
    total_NH: Tensor | None


@dataclass(frozen=True)
class SoftmaxGradients:
    """What the loss gives back to one stage, for every token.

    Attributes:
        exp_N: Gradient of its exponentials.
        logit_N: Gradient of the target's logit, where the stage has it.
        total_N: Gradient of the weighted sum.
    """

    exp_N: Tensor
    logit_N: Tensor
    total_N: Tensor


@dataclass(frozen=True)
class KeptSoftmax:
    """What a stage keeps of a softmax until the gradient of its rows is computed."""

    query: SoftmaxQuery
    exp_NR: Tensor
    slope_NR: Tensor | None
    tokens: Tensor
    classes: Tensor
    summed_R: Tensor | None

    @torch.no_grad()
    def add_gradients(
        self, given: SoftmaxGradients, weight_RH: Tensor | None, bias_R: Tensor | None
    ) -> None:
        """Add the gradients of the rows and of their bias to what is given for each.

        The exponentials are used up.
        """
        gradient_NR = self.exp_NR.mul_(given.exp_N[:, None])
        gradient_NR[self.tokens, self.classes] = given.logit_N[self.tokens].to(gradient_NR.dtype)
        if self.summed_R is not None:
            gradient_NR.addcmul_(given.total_N[:, None], self.summed_R)
        if self.slope_NR is not None:
            gradient_NR.mul_(self.slope_NR)
        x_NH = self.query.x_NH
        narrow_NR = gradient_NR.to(x_NH.dtype)
        if weight_RH is not None and weight_RH.dtype is x_NH.dtype:
            weight_RH.addmm_(narrow_NR.t(), x_NH)
        elif weight_RH is not None:
            weight_RH.add_(narrow_NR.t() @ x_NH)
        if bias_R is not None:
            bias_R.add_(narrow_NR.sum(0))


@torch.no_grad()
def softmax_part(
    query: SoftmaxQuery, weight_RH: Tensor, bias_R: Tensor | None, first: int
) -> tuple[SoftmaxPart, KeptSoftmax]:
    """Compute what one stage has of a softmax.

    Args:
        query: Which.
        weight_RH: Rows of the table.
        bias_R: Their bias.
        first: Number of the first row in the whole table.

    Returns:
        What the last stage needs, and what is kept here for the gradient of the rows.
    """
    x_NH = query.x_NH
    rows = slice(first, first + len(weight_RH))
    narrow_RH = weight_RH.to(x_NH.dtype)
    with no_autocast():
        bias_R = None if bias_R is None else bias_R.to(x_NH.dtype)
        product_NR = functional.linear(x_NH, narrow_RH, bias_R)
        logits_NR, slope_NR = _with_slope(product_NR, query.pointwise, rows)
        del product_NR
        logits_NR = logits_NR.to(loss_dtype(x_NH))
        here = (query.target_N >= rows.start) & (query.target_N < rows.stop)
        tokens = here.nonzero().flatten()
        classes = query.target_N[tokens] - rows.start
        logit_N = logits_NR.new_zeros(len(x_NH))
        logit_N[tokens] = logits_NR[tokens, classes]
        summed_R = None if query.summed_V is None else query.summed_V[rows].to(logits_NR.dtype)
        total_N = None if summed_R is None else logits_NR @ summed_R
        max_N = logits_NR.amax(1) if len(x_NH) else logits_NR.new_empty(0)
        exp_NR = logits_NR.sub_(max_N[:, None]).exp_()
        sum_N = exp_NR.sum(1)
        exp_N = torch.zeros_like(logit_N)
        exp_N[tokens] = exp_NR[tokens, classes]
        exp_NR[tokens, classes] = 0.0
        others_NH = own_NH = total_NH = None
        if query.needs_x:
            others_NH = _times(exp_NR, slope_NR).to(x_NH.dtype) @ narrow_RH
            own_NH = torch.zeros_like(x_NH)
            own_NH[tokens] = narrow_RH[classes]
            if slope_NR is not None:
                own_NH[tokens] *= slope_NR[tokens, classes][:, None].to(x_NH.dtype)
            if summed_R is not None:
                weights_NR = summed_R[None] if slope_NR is None else slope_NR * summed_R
                total_NH = (weights_NR.to(x_NH.dtype) @ narrow_RH).expand_as(x_NH)
    part = SoftmaxPart(max_N, sum_N, logit_N, exp_N, total_N, others_NH, own_NH, total_NH)
    return part, KeptSoftmax(query, exp_NR, slope_NR, tokens, classes, summed_R)


def _with_slope(
    product_NR: Tensor, pointwise: Pointwise, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """Return the logits, and the derivative of each; None where it is 1.

    The logits have memory of their own, to be written into.
    """
    casts = all(step.kind in ("cast", "add") for step in pointwise)
    if casts:
        return apply(pointwise, product_NR, rows), None
    with torch.enable_grad():
        product_NR.requires_grad_()
        logits_NR = apply(pointwise, product_NR, rows)
        (slope_NR,) = torch.autograd.grad(logits_NR, product_NR, torch.ones_like(logits_NR))
    return logits_NR.detach(), slope_NR.to(loss_dtype(product_NR))


def _times(values: Tensor, slope: Tensor | None) -> Tensor:
    return values if slope is None else values * slope


def loss_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which losses of hidden states are computed."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def spread_table(model: nn.Module, plan: Plan, last: Sequence[Program]) -> SpreadTable:
    """Return the table that a plan spreads; ``last`` are the programs of the last stage.

    Raises:
        LoweringError: Its projection and its loss are not the end of the last stage, or the loss
            cannot be run apart from the other blocks, and twice.
    """
    assert plan.vocabulary is not None
    head = spread_head(plan.graph)
    names = [program.name for program in last]
    if head.head.name not in names or names[-1] != LOSS:
        raise LoweringError(
            f"the vocabulary is spread over stages, and the last stage does not end with block "
            f"{head.head.name!r} and the loss; plan both into it, or plan without vocabulary"
        )
    loss = last[-1]
    if loss.changing or any(getattr(m, "runs_live", False) for m in loss.module.modules()):
        what = "is a trainer's own" if not loss.changing else "changes tensors of the model"
        raise LoweringError(
            f"the loss {what}, and where the vocabulary is spread over stages it is run twice; "
            "plan without vocabulary"
        )
    return whole_table(model, plan)


def whole_table(model: nn.Module, plan: Plan) -> SpreadTable:
    """Return the table that a plan spreads."""
    assert plan.vocabulary is not None
    head = spread_head(plan.graph)
    table = dict(model.named_parameters(remove_duplicate=False))[head.table.parameter]
    return SpreadTable(head.head.name, table, plan.vocabulary.by_stage, plan.vocabulary.size)


# ---- the last stage ------------------------------------------------------------------------------


@dataclass
class SpreadLoss:
    """The loss of one microbatch in the last stage, while other stages compute its softmax.

    Attributes:
        queries: What it needs of them.
        given_back: What each stage gets for every query, behind the backward pass.
    """

    may_be_whole: ClassVar[bool] = False

    table: SpreadTable
    queries: list[SoftmaxQuery] = field(default_factory=list)
    given_back: list[dict[int, SoftmaxGradients]] = field(default_factory=list)
    _parts: Mapping[int, Sequence[SoftmaxPart]] | None = None
    _asked: int = 0

    def collect(self, loss: Callable[[], object]) -> None:
        """Run a loss to see what it needs; what it returns has no meaning.

        Raises:
            LoweringError: It computes no cross entropy of the logits.
        """
        loss()
        if not self.queries:
            raise LoweringError(
                f"the loss computes no cross entropy of what block {self.table.block!r} projects "
                "with functional.linear on its own table, so that the vocabulary cannot be spread "
                "over stages; plan without vocabulary"
            )

    def combine(self, parts: Mapping[int, Sequence[SoftmaxPart]]) -> None:
        """Take the parts of all stages, for a run of the loss that counts."""
        self._parts, self._asked, self.given_back = parts, 0, [{} for _ in self.queries]

    def free(self) -> None:
        """Forget the parts; what the loss gives back is kept."""
        self._parts = {}

    def softmax(
        self, logits: DeferredLogits, target_N: Tensor | None, summed_V: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logarithm of the sum of exponentials, the target's logit and a sum of all."""
        if self._parts is None:
            query = _query(logits, target_N, summed_V)
            self.queries.append(query)
            none_N = query.x_NH.new_zeros(len(query.x_NH), dtype=loss_dtype(query.x_NH))
            return none_N, none_N, none_N
        number, self._asked = self._asked, self._asked + 1
        parts = {stage: found[number] for stage, found in self._parts.items()}
        x_NH = logits.x.reshape(-1, logits.x.shape[-1])
        anchor = torch.zeros((), device=x_NH.device, requires_grad=True)
        found: tuple[Tensor, Tensor, Tensor] = _Combined.apply(
            x_NH, anchor, parts, self.given_back[number]
        )
        return found

    def cross_entropy(
        self,
        logits: DeferredLogits,
        target_N: Tensor,
        options: LossOptions,
    ) -> Tensor:
        """Return what ``functional.cross_entropy`` returns, in float32 or float64."""
        class_weight_V, reduction, ignore_index, label_smoothing = options
        check_targets(target_N, self.table.size, ignore_index)
        counts = target_N != ignore_index
        summed_V = class_weight_V
        if label_smoothing and summed_V is None:
            summed_V = logits.x.new_ones(()).expand(self.table.size)
        lse_N, logit_N, total_N = self.softmax(
            logits,
            torch.where(counts, target_N, NO_CLASS),
            summed_V if label_smoothing else None,
        )
        weight_N = counts.to(lse_N.dtype)
        if class_weight_V is not None:
            weight_N = weight_N * class_weight_V[target_N.where(counts, 0)].to(lse_N.dtype)
        loss_N = weight_N * (lse_N - logit_N)
        if label_smoothing:
            assert summed_V is not None
            all_N = summed_V.to(lse_N.dtype).sum() * lse_N - total_N
            loss_N = (1 - label_smoothing) * loss_N + label_smoothing / self.table.size * all_N
        # Ignored tokens have no gradient, also where no other token counts and the mean is 0 / 0.
        loss_N = torch.where(counts, loss_N, 0.0)
        if reduction == "none":
            return loss_N
        return loss_N.sum() if reduction == "sum" else loss_N.sum() / weight_N.sum()

    def logsumexp(self, logits: DeferredLogits) -> Tensor:
        """Return what ``torch.logsumexp`` over the classes returns."""
        lse_N = self.softmax(logits, None, None)[0]
        return lse_N.reshape(logits.shape[:-1]).to(logits.dtype)


def _query(
    logits: DeferredLogits, target_N: Tensor | None, summed_V: Tensor | None
) -> SoftmaxQuery:
    bias = logits.bias_V
    if bias is not None and not isinstance(bias, nn.Parameter):
        raise LoweringError(
            "the bias of the output projection is computed, so that its rows cannot be spread "
            "over stages with the vocabulary; plan without vocabulary"
        )
    x = logits.input()
    x_NH = x.detach().reshape(-1, x.shape[-1])
    if target_N is None:
        target_N = torch.full((len(x_NH),), NO_CLASS, device=x.device)
    return SoftmaxQuery(x_NH, bias, logits.pointwise, target_N, summed_V, logits.x.requires_grad)


class _Combined(torch.autograd.Function):
    """Combines the parts of all stages in their order; the gradient is known but for factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NH: Tensor,
        _anchor: Tensor,
        parts: dict[int, SoftmaxPart],
        given_back: dict[int, SoftmaxGradients],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ordered = [parts[stage] for stage in sorted(parts)]
        max_N = torch.stack([part.max_N for part in ordered]).amax(0)
        sums = [part.sum_N * (part.max_N - max_N).exp() for part in ordered]
        ctx.sum_N = torch.stack(sums).sum(0)
        ctx.max_N, ctx.parts, ctx.given_back, ctx.dtype = max_N, parts, given_back, x_NH.dtype
        logit_N = torch.stack([part.logit_N for part in ordered]).sum(0)
        totals = [part.total_N for part in ordered if part.total_N is not None]
        total_N = torch.stack(totals).sum(0) if totals else torch.zeros_like(logit_N)
        return max_N + ctx.sum_N.log(), logit_N, total_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, lse_N: Tensor, logit_N: Tensor, total_N: Tensor
    ) -> tuple[Tensor | None, None, None, None]:
        gradient_NH: Tensor | None = None
        for stage in sorted(ctx.parts):
            part = ctx.parts[stage]
            exp_N = lse_N * (part.max_N - ctx.max_N).exp() / ctx.sum_N
            own_N = exp_N * part.exp_N + logit_N
            ctx.given_back[stage] = SoftmaxGradients(exp_N, own_N, total_N)
            if part.others_NH is None:
                continue
            found_NH = part.others_NH * exp_N[:, None]
            found_NH.addcmul_(part.own_NH.to(found_NH.dtype), own_N[:, None])
            if part.total_NH is not None:
                found_NH.addcmul_(part.total_NH.to(found_NH.dtype), total_N[:, None])
            gradient_NH = found_NH if gradient_NH is None else gradient_NH.add_(found_NH)
        if not ctx.needs_input_grad[0] or gradient_NH is None:
            return None, None, None, None
        return gradient_NH.to(ctx.dtype), None, None, None
