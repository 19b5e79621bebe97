"""Chunked losses: logits that are not computed until something needs them.

While training, a serialized projection in front of the loss gives :class:`DeferredLogits`: shape
and dtype of the logits, but no memory. What models do between projection and loss (reshape, cut
off the last token, cast, scale, add a bias) is done to the hidden states or the bias instead, a
soft cap is remembered, and a cross entropy takes all of it together, as one fused operation.
Anything else computes the logits and goes on with them: the result is the same, only the memory is
that of the plain model.

Axes: V classes, H hidden size, N tokens; ``...`` are the token axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map_only

from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ops.autocast import autocast_dtype, no_autocast
from ipu_pipeline.ops.linear_cross_entropy import (
    Elementwise,
    LossOptions,
    Pointwise,
    apply,
    linear_cross_entropy,
)

if TYPE_CHECKING:
    from ipu_pipeline.stages.vocabulary import SpreadLoss


@dataclass
class _Projection:
    """What all views of the same logits have in common.

    Attributes:
        weight_VH: The table.
        factor: Number of slices.
        hold_gradients: Compute a fused loss's gradients in its forward pass.
        compute_dtype: Input, weight and bias are cast to it.
        softmax: Takes all that a loss needs of them, where the rows are spread over stages.
        num_views: How many other objects stand for the same logits.
    """

    weight_VH: Tensor
    factor: int
    hold_gradients: bool
    compute_dtype: torch.dtype
    softmax: SpreadLoss | None = None
    num_views: int = 0

    @property
    def num_classes(self) -> int:
        """Rows of the whole table."""
        return len(self.weight_VH) if self.softmax is None else self.softmax.table.size

    @property
    def is_spread(self) -> bool:
        """Whether nothing may need the logits as a whole."""
        return self.softmax is not None and not self.softmax.may_be_whole


class DeferredLogits(Tensor):
    """The logits ``x @ weight.T + bias``, not computed. Made by :meth:`of`."""

    x: Tensor
    bias_V: Tensor | None
    projection: _Projection
    pointwise: Pointwise
    x_version: int
    _computed: Tensor | None

    @staticmethod
    def of(
        x: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        *,
        factor: int = 1,
        hold_gradients: bool = False,
        softmax: SpreadLoss | None = None,
    ) -> DeferredLogits:
        """Return the logits of one call of ``functional.linear``; see ``_Projection``."""
        dtype = torch.result_type(x, weight_VH)
        narrow = autocast_dtype(x.device)
        if narrow is not None and dtype != torch.float64:
            dtype = narrow
        projection = _Projection(weight_VH, factor, hold_gradients, dtype, softmax)
        return _make(projection, x, bias_V, dtype)

    @property
    def computed_from(self) -> Tensor:
        """What tells them apart from other logits of the same projection."""
        return self.x if self._computed is None else self._computed

    def input(self) -> Tensor:
        """Return the input in the dtype that the projection computes in.

        Raises:
            LoweringError: It was changed in place since.
        """
        if self.x._version != self.x_version:
            raise LoweringError(
                "the input of a serialized projection is changed in place before its logits are "
                "used; do not serialize that block"
            )
        return self.x.to(self.projection.compute_dtype)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return input, weight and bias in the dtype that the projection computes in."""
        dtype = self.projection.compute_dtype
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        return self.input(), self.projection.weight_VH.to(dtype), bias_V

    def materialised(self) -> Tensor:
        """Compute the logits, once.

        Raises:
            LoweringError: Gradients are switched off here: inside an ``autograd.Function`` they
                would be lost without a word. Or the classes are spread over stages.
        """
        if self.projection.is_spread:
            raise LoweringError(
                "the logits are needed as a whole, and their classes are spread over stages, which "
                "compute a cross entropy or a logsumexp of all classes; plan without vocabulary"
            )
        if self._computed is None:
            if not torch.is_grad_enabled() and self.projection.softmax is None:
                raise LoweringError(
                    "the logits of a serialized block are read where gradients are switched off "
                    "(torch.no_grad, or an autograd.Function of the model); do not serialize that "
                    "block, or read them outside"
                )
            x, weight_VH, bias_V = self.operands()
            with no_autocast():
                full = functional.linear(x, weight_VH, bias_V)
            self._computed = apply(self.pointwise, full).to(self.dtype)
        return self._computed

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _COMMUTATIVE and len(args) == 2 and not kwargs:
            args = args if isinstance(args[0], DeferredLogits) else args[::-1]
        logits = args[0] if args else None
        if isinstance(logits, DeferredLogits):
            if func in _DESCRIPTIONS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func in _HANDLERS and logits._computed is None:
                result = _HANDLERS[func](logits, *args[1:], **kwargs)
                if result is not None:
                    return result
            _refuse_whole_logits(logits, func)
        _refuse_hidden_writes(func, args, kwargs)
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.materialised, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise LoweringError(
            f"the logits of a serialized block reached {func} from compiled code, which does not "
            "see that they are not computed; do not serialize that block"
        )


def _make(
    projection: _Projection,
    x: Tensor,
    bias_V: Tensor | None,
    dtype: torch.dtype,
    pointwise: Pointwise = (),
) -> DeferredLogits:
    shape = (*x.shape[:-1], projection.num_classes)
    needs_grad = any(t is not None and t.requires_grad for t in (x, bias_V, projection.weight_VH))
    logits: DeferredLogits = Tensor._make_wrapper_subclass(
        DeferredLogits, shape, dtype=dtype, device=x.device, requires_grad=needs_grad
    )
    logits.x, logits.bias_V, logits.projection = x, bias_V, projection
    logits.pointwise = pointwise
    logits.x_version = x._version
    logits._computed = None
    return logits


def _view(logits: DeferredLogits, x: Tensor) -> DeferredLogits:
    logits.projection.num_views += 1
    return _make(logits.projection, x, logits.bias_V, logits.dtype, logits.pointwise)


def _then(
    logits: DeferredLogits, function: Elementwise, dtype: torch.dtype | None = None
) -> DeferredLogits:
    pointwise = (*(logits.pointwise or (Elementwise("cast", logits.dtype),)), function)
    return _make(logits.projection, logits.x, logits.bias_V, dtype or logits.dtype, pointwise)


def _refuse_whole_logits(logits: DeferredLogits, func: Any) -> None:
    if logits.projection.is_spread:
        name = getattr(func, "__name__", str(func))
        raise LoweringError(
            f"the loss uses {name} of the logits, which needs them as a whole, and their classes "
            "are spread over stages; these compute cross_entropy and logsumexp of N x classes, "
            "behind changes of shape, casts, factors, tanh and a fixed bias: plan without "
            "vocabulary"
        )


def _refuse_hidden_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a write that other objects standing for the same logits would not see."""
    name = getattr(func, "__name__", "")
    writes = name == "__setitem__" or name[:3] == "__i" or name.rstrip("_") + "_" == name
    if not writes and not kwargs.get("inplace"):
        return
    for each in tree_leaves((args, kwargs)):
        if not isinstance(each, DeferredLogits):
            continue
        if each.projection.softmax is not None:
            raise LoweringError(
                f"{name} writes into logits whose classes are spread over stages; compute others "
                "from them, or plan without vocabulary"
            )
        if each.projection.num_views:
            raise LoweringError(
                f"{name} writes into the logits of a serialized block of which the model also "
                "holds views; do not serialize that block"
            )


# ---- what is done to the hidden states instead; None: not possible, compute the logits ---------


def _reshape(logits: DeferredLogits, *shape: Any) -> DeferredLogits | None:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if isinstance(sizes, torch.dtype):  # Tensor.view(dtype)
        return None
    target = torch.empty(logits.shape, device="meta").reshape(sizes).shape
    if not target or target[-1] != logits.shape[-1]:
        return None
    return _view(logits, logits.x.reshape(*target[:-1], logits.x.shape[-1]))


def _flatten(logits: DeferredLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    return _reshape(
        logits, torch.empty(logits.shape, device="meta").flatten(start_dim, end_dim).shape
    )


def _index(logits: DeferredLogits, index: Any) -> DeferredLogits | None:
    entries = list(index) if isinstance(index, tuple) else [index]
    known = Tensor | slice | int | type(...) | None
    if any(isinstance(entry, bool) or not isinstance(entry, known) for entry in entries):
        return None
    rank = sum(_axes_used(entry) for entry in entries)
    if Ellipsis not in [entry for entry in entries if not isinstance(entry, Tensor)]:
        reaches_classes = rank == logits.ndim
    else:
        reaches_classes = entries[-1] is not Ellipsis
    if reaches_classes:
        last = entries[-1]
        classes = logits.shape[-1]
        if not isinstance(last, slice) or last.indices(classes) != (0, classes, 1):
            return None
        entries[-1] = slice(None)
    return _view(logits, logits.x[tuple(entries)])


def _axes_used(entry: Any) -> int:
    if entry is None or entry is Ellipsis:
        return 0
    if isinstance(entry, Tensor) and entry.dtype == torch.bool:
        return entry.ndim
    return 1


def _cast(logits: DeferredLogits, dtype: torch.dtype) -> DeferredLogits | None:
    """Only to the dtype that losses are computed in anyway: others round."""
    if dtype == logits.dtype:
        return logits
    if logits.projection.softmax is not None:
        return _then(logits, Elementwise("cast", dtype), dtype) if dtype.is_floating_point else None
    if dtype != torch.float32 or logits.dtype == torch.float64 or logits.pointwise:
        return None
    return _make(logits.projection, logits.x, logits.bias_V, dtype)


def _to(logits: DeferredLogits, *args: Any, **kwargs: Any) -> DeferredLogits | None:
    wishes = [*args, *kwargs.values()]
    if any(not isinstance(w, torch.dtype | torch.device | str | bool | None) for w in wishes):
        return None
    if any(torch.device(w) != logits.device for w in wishes if isinstance(w, torch.device | str)):
        return None
    dtypes = [w for w in wishes if isinstance(w, torch.dtype)]
    return _cast(logits, dtypes[0]) if dtypes else logits


def _add(logits: DeferredLogits, other: Any, *, alpha: float = 1) -> DeferredLogits | None:
    spread = logits.projection.softmax is not None
    if (
        alpha != 1
        or (logits.pointwise and not spread)
        or not isinstance(other, Tensor)
        or isinstance(other, DeferredLogits)
    ):
        return None
    classes = logits.shape[-1]
    if other.shape[-1:] != (classes,) or other.numel() != classes or other.ndim > logits.ndim:
        return None
    bias_V = other.reshape(-1)
    dtype = torch.promote_types(logits.dtype, other.dtype)
    if spread:
        fixed = Elementwise("add", bias_V)
        return None if other.requires_grad else _then(logits, fixed, dtype)
    if logits.bias_V is not None:
        bias_V = bias_V + logits.bias_V
    return _make(logits.projection, logits.x, bias_V, dtype)


def _scale(logits: DeferredLogits, factor: Any) -> DeferredLogits | None:
    if not isinstance(factor, int | float) or isinstance(factor, bool):
        return None
    if logits.pointwise or logits.projection.softmax is not None:
        return _then(logits, Elementwise("mul", factor))
    bias_V = None if logits.bias_V is None else logits.bias_V * factor
    return _make(logits.projection, logits.x * factor, bias_V, logits.dtype)


def _divide(logits: DeferredLogits, divisor: Any, **how: Any) -> DeferredLogits | None:
    if how or not isinstance(divisor, int | float) or divisor == 0:
        return None
    return _scale(logits, 1 / divisor)


def _cross_entropy(  # the parameters of functional.cross_entropy
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: Any = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    by_class = logits.ndim == 2 and target.ndim == 1 and target.dtype == torch.int64
    if not by_class or size_average is not None or reduce is not None:
        return None
    in_autocast = autocast_dtype(logits.device) is not None
    options = LossOptions(weight, reduction, ignore_index, label_smoothing)
    if logits.projection.softmax is not None:
        with no_autocast():
            loss = logits.projection.softmax.cross_entropy(logits, target, options)
        return loss if in_autocast else loss.to(logits.dtype)
    if not torch.is_grad_enabled():
        return None
    x_NH, weight_VH, bias_V = logits.operands()
    with no_autocast():
        loss = linear_cross_entropy(
            x_NH,
            weight_VH,
            target,
            bias_V,
            num_slices=logits.projection.factor,
            hold_gradients=logits.projection.hold_gradients,
            pointwise=logits.pointwise,
            **options._asdict(),
        )
    return loss if in_autocast else loss.to(logits.dtype)


def _logsumexp(logits: DeferredLogits, dim: Any, keepdim: bool = False) -> Tensor | None:  # noqa: FBT001, FBT002
    axes = [dim] if isinstance(dim, int) else list(dim)
    if logits.projection.softmax is None or axes not in ([-1], [logits.ndim - 1]):
        return None
    found = logits.projection.softmax.logsumexp(logits)
    return found.unsqueeze(-1) if keepdim else found


_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshape),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flatten),
    **dict.fromkeys((Tensor.add, torch.add), _add),
    **dict.fromkeys((Tensor.mul, torch.mul), _scale),
    **dict.fromkeys((Tensor.div, torch.div), _divide),
    **dict.fromkeys((Tensor.tanh, torch.tanh), lambda logits: _then(logits, Elementwise("tanh"))),
    Tensor.__getitem__: _index,
    Tensor.contiguous: lambda logits, *_, **__: logits,
    Tensor.float: lambda logits, **_: _cast(logits, torch.float32),
    Tensor.to: _to,
    functional.cross_entropy: _cross_entropy,
    **dict.fromkeys((Tensor.logsumexp, torch.logsumexp), _logsumexp),
}
_COMMUTATIVE = frozenset({Tensor.add, torch.add, Tensor.mul, torch.mul})
_DESCRIPTIONS = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
        *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_sparse", "is_meta")),
        *(Tensor._version.__get__, Tensor.is_inference),  # type: ignore[attr-defined]
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.stride),
        *(Tensor.is_floating_point, Tensor.is_contiguous, Tensor.get_device),
    }
)
