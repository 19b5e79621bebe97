"""An output projection and its cross entropy in one operation that never holds the full logits.

Tokens are taken slice by slice: the logits of a slice become its losses and, in the same memory,
the gradient of its logits, from which the gradients of input and weight are accumulated. Without
the C++ kernels the same is done with torch's own operations.

Functions of every logit alone may stand between the two (a soft cap); those are torch's operations.

Axes: N tokens, H hidden features, V classes (the vocabulary).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ipu_pipeline.ops import extension
from ipu_pipeline.ops.autocast import autocast_like_linear, no_autocast
from ipu_pipeline.ops.dropout import FLOATS

Reduction = Literal["mean", "sum", "none"]
# Below this torch adds a whole tensor on one thread, so the sum does not depend on threads.
SUM_PIECE = 16_384
# With more tokens a slice has matmuls that are hardly faster, and logits as large as the weight.
MOST_TOKENS = 512


_ALL = slice(None)


class Elementwise(NamedTuple):
    """A function of every logit alone.

    ``operand`` is a dtype (``cast``), a vector of the classes (``add``) or a number (``mul``).
    """

    kind: Literal["cast", "add", "mul", "tanh"]
    operand: Any = None

    def __call__(self, logits: Tensor, rows: slice = _ALL) -> Tensor:
        """Return the function of logits, which are those of the classes ``rows``."""
        if self.kind == "cast":
            return logits.to(self.operand)
        if self.kind == "tanh":
            return logits.tanh()
        return logits + self.operand[rows] if self.kind == "add" else logits * self.operand


Pointwise = tuple[Elementwise, ...]


class LossOptions(NamedTuple):
    """What ``functional.cross_entropy`` takes besides logits and targets."""

    class_weight_V: Tensor | None
    reduction: Reduction
    ignore_index: int
    label_smoothing: float


def apply(pointwise: Pointwise, logits: Tensor, rows: slice = _ALL) -> Tensor:
    """Apply the functions one after the other to the logits of the classes ``rows``."""
    for function in pointwise:
        logits = function(logits, rows)
    return logits


class _Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    num_slices: int
    pointwise: Pointwise

    def slice_tokens(self, num_tokens: int) -> int:
        num_slices = max(self.num_slices, -(-num_tokens // MOST_TOKENS))
        return max(1, -(-num_tokens // num_slices))


class _Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    class_weight: Tensor | None


def linear_cross_entropy(  # noqa: PLR0913 - those of linear and cross_entropy together
    x_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    class_weight_V: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_slices: int = 1,
    hold_gradients: bool = True,
    pointwise: Pointwise = (),
) -> Tensor:
    """Compute ``cross_entropy(linear(x, weight, bias), target, ...)`` in slices of tokens.

    Reductions, class weights, ignored tokens and label smoothing mean what they mean in
    ``torch.nn.functional.cross_entropy``. A second derivative is not available.

    Args:
        x_NH: Input of the projection.
        weight_VH: Weight of the projection, of the same type.
        target_N: Class of every token, int64.
        bias_V: Bias of the projection, or None.
        class_weight_V: Weight of every class, or None.
        reduction: ``"mean"`` over the weights of the tokens, ``"sum"`` or ``"none"``.
        ignore_index: Tokens of this class count nowhere.
        label_smoothing: 0 to 1, the share of the target spread over all classes.
        num_slices: At least this many slices, of 512 tokens at most; the logits of one slice exist.
        hold_gradients: Compute the gradients together with the loss and hold them until backward
            (3 matmuls). Without it, or with reduction ``"none"``, or in float16, whose gradients
            need the loss scale that only backward knows, backward computes the logits again
            (4 matmuls, nothing is held).

        pointwise: Functions of every logit alone, without gradients of their own.

    Returns:
        The loss, a scalar, or N losses with reduction ``"none"``; float64 for float64 input, else
        float32.

    Raises:
        ValueError: A shape, type or option does not fit.
        IndexError: A target is neither a class nor ``ignore_index``.
    """
    x_NH, weight_VH, bias_V = autocast_like_linear(x_NH, weight_VH, bias_V)
    operands = _Operands(x_NH, weight_VH, bias_V, target_N, class_weight_V)
    _check_operands(operands)
    options = _Options(ignore_index, label_smoothing, num_slices, pointwise)
    _check_options(options, reduction)
    check_targets(target_N, weight_VH.shape[0], ignore_index)
    hold = hold_gradients and torch.is_grad_enabled() and x_NH.dtype is not torch.float16
    return _LinearCrossEntropy.apply(*operands, options, reduction, hold)


def _check_operands(operands: _Operands) -> None:
    x, weight, bias, target, class_weight = operands
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must be N x H and V x H; "
            "flatten the tokens to N rows"
        )
    types = [each.dtype for each in (x, weight, bias) if each is not None]
    if x.dtype not in FLOATS or len(set(types)) != 1:
        raise ValueError(
            f"x, weight and bias are {', '.join(map(str, types))}; "
            "use float32, float64, bfloat16 or float16 for all of them"
        )
    if target.shape != x.shape[:1] or target.dtype is not torch.int64:
        raise ValueError(
            f"target is {target.dtype} {tuple(target.shape)}, needed is int64 ({x.shape[0]},): "
            "one class per token"
        )
    for name, vector in (("bias", bias), ("class_weight", class_weight)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(
                f"{name} {tuple(vector.shape)} must have one entry for each of the "
                f"{weight.shape[0]} rows of weight"
            )


def _check_options(options: _Options, reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction {reduction!r} is unknown; use one of {', '.join(get_args(Reduction))}"
        )
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing {options.label_smoothing} must be between 0 and 1")
    if options.num_slices < 1:
        raise ValueError(f"num_slices {options.num_slices} must be at least 1")


def check_targets(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse a target that is no class.

    Raises:
        IndexError: It is neither a class nor ``ignore_index``.
    """
    wrong = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if wrong.any():
        raise IndexError(
            f"target {int(target[wrong][0])} is out of bounds for {num_classes} classes and is not "
            f"ignore_index {ignore_index}"
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        operands = _Operands(*arguments[:5])
        options, reduction, hold = arguments[5:]
        ctx.save_for_backward(*operands)
        ctx.options = options
        ctx.scale = _scale(operands, options, reduction)
        ctx.held = None
        needs = ctx.needs_input_grad[:3]
        with no_autocast():
            if hold and reduction != "none" and any(needs):
                losses, *ctx.held = _gradients(operands, options, ctx.scale, needs)
            else:
                losses = _gradients(operands, options, None, (False, False, False))[0]
        return losses if reduction == "none" else _sum(losses) * ctx.scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd may keep a gradient that nobody else refers to instead of copying it.
        held, ctx.held = ctx.held, None
        if held is None:
            operands, needs = _Operands(*ctx.saved_tensors), ctx.needs_input_grad[:3]
            with no_autocast():
                _, *held = _gradients(operands, ctx.options, ctx.scale * grad, needs)
        elif grad.item() != 1.0:
            for each in held:
                if each is not None:
                    each.mul_(grad)
        return (*held, None, None, None, None, None)


def _loss_dtype(operands: _Operands) -> torch.dtype:
    return torch.float64 if operands.x.dtype is torch.float64 else torch.float32


def _scale(operands: _Operands, options: _Options, reduction: Reduction) -> Tensor:
    """Return what every token's loss is multiplied with, a scalar."""
    target, class_weight = operands.target, operands.class_weight
    one = torch.ones((), dtype=_loss_dtype(operands))
    if reduction != "mean":
        return one
    counted = target[target != options.ignore_index]
    if class_weight is None:
        return one / counted.numel()
    return one / _sum(class_weight.to(one.dtype)[counted])


def _sum(values: Tensor) -> Tensor:
    return torch.stack([piece.sum() for piece in values.split(SUM_PIECE)]).sum()


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, bias, _, scale, *_, need_x, need_weight, need_bias = rest
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    needs = (need_x, need_weight, need_bias and bias is not None)
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return (
        x.new_empty(x.shape[:1], dtype=dtype),
        *(
            x.new_empty(shape if need and scale is not None else (0,))
            for shape, need in zip(shapes, needs, strict=True)
        ),
    )


_kernels = extension.kernels(linear_cross_entropy=_fake)


def _gradients(
    operands: _Operands, options: _Options, scale: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the losses and the gradients of x, weight and bias that are needed.

    ``scale`` is a scalar or N; None where no gradient is needed.
    """
    x, weight, bias, target, class_weight = operands
    step = options.slice_tokens(len(x))
    scale_N = None if scale is None else scale.expand(len(x))
    if _kernels() and not options.pointwise:
        losses, *found = torch.ops.ipu_pipeline.linear_cross_entropy(
            x, weight, target, bias, class_weight, scale_N, options.ignore_index,
            options.label_smoothing, step, *needs,
        )  # fmt: skip
        wanted = (*needs[:2], needs[2] and bias is not None)
        dx, dw, db = (each if need else None for each, need in zip(found, wanted, strict=True))
        return losses, dx, dw, db
    losses = x.new_empty(len(x), dtype=_loss_dtype(operands))
    dx, dw, db = (
        torch.zeros_like(each) if need and each is not None else None
        for each, need in zip((x, weight, bias), needs, strict=True)
    )
    for cut in (slice(start, start + step) for start in range(0, len(x), step)):
        part = None if scale_N is None else scale_N[cut]
        losses[cut], grad = _slice_losses(operands, options, cut, part)
        if grad is None:
            continue
        if dx is not None:
            torch.mm(grad, weight, out=dx[cut])
        if dw is not None:
            dw.addmm_(grad.t(), x[cut])
        if db is not None:
            db += grad.sum(0)
    return losses, dx, dw, db


def _slice_losses(
    operands: _Operands, options: _Options, cut: slice, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the losses of a slice and, given a scale, the gradient of its logits."""
    logits = functional.linear(operands.x[cut], operands.weight, operands.bias).detach()
    class_weight = operands.class_weight
    with torch.enable_grad():
        logits.requires_grad_(scale is not None)
        wide = apply(options.pointwise, logits).to(_loss_dtype(operands))
        losses = functional.cross_entropy(
            wide,
            operands.target[cut],
            None if class_weight is None else class_weight.to(wide.dtype),
            ignore_index=options.ignore_index,
            reduction="none",
            label_smoothing=options.label_smoothing,
        )
    grad = None if scale is None else torch.autograd.grad(losses, logits, scale)[0]
    return losses.detach(), grad
