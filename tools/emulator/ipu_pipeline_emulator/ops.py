"""Operations of the front end: on the CPU they compute what the documentation says they do."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn

from . import tracing
from .enums import MatMulSerializationMode, OverlapMode
from .errors import backend_error
from .options_base import require, require_type
from .structure import map_leaves


def recomputationCheckpoint(*tensors: Any) -> Any:
    """Keep these tensors for the backward pass; use what is returned.

    Args:
        tensors: Tensors, or one list or tuple of them.

    Raises:
        ValueError: Something is not a tensor.
    """
    values = tensors
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        values = tuple(tensors[0])
    for value in values:
        if not isinstance(value, Tensor):
            raise ValueError(
                "recomputationCheckpoint takes tensors, or one list or tuple of tensors, got "
                f"{type(value).__name__}"
            )
    tracing.note_checkpoints(len(values))
    if len(tensors) == 1:
        return tensors[0]
    return tuple(values)


def serializedMatMul(
    lhs: Tensor,
    rhs: Tensor,
    mode: MatMulSerializationMode,
    factor: int = 0,
    keep_precision: bool = False,
) -> Tensor:
    """Multiply ``lhs[m, n] @ rhs[n, p]`` in slices; the result is that of ``torch.matmul``.

    Raises:
        AssertionError: Wrong types.
        Error: While compiling: the factor does not divide the axis, or unsupported ranks.
    """
    require_type(lhs, Tensor, "serializedMatMul's lhs")
    require_type(rhs, Tensor, "serializedMatMul's rhs")
    require_type(mode, MatMulSerializationMode, "serializedMatMul's mode")
    require_type(factor, int, "serializedMatMul's factor")
    require_type(keep_precision, bool, "serializedMatMul's keep_precision")
    if tracing.is_running() and mode is not MatMulSerializationMode.Disabled:
        _check_serialized(lhs, rhs, mode, factor)
        tracing.note_serialized(mode.value, factor, lhs, rhs)
    return torch.matmul(lhs, rhs)


def _check_serialized(lhs: Tensor, rhs: Tensor, mode: MatMulSerializationMode, factor: int) -> None:
    for side, tensor in (("lhs", lhs), ("rhs", rhs)):
        if tensor.dim() not in (2, 3):
            raise backend_error(
                f"serializedMatMul needs operands of rank 2 or 3, {side} has shape "
                f"{tuple(tensor.shape)}"
            )
    name, length = {
        MatMulSerializationMode.InputChannels: ("m", lhs.shape[-2]),
        MatMulSerializationMode.ReducingDim: ("n", lhs.shape[-1]),
        MatMulSerializationMode.OutputChannels: ("p", rhs.shape[-1]),
    }[mode]
    if factor < 1 or length % factor:
        raise backend_error(
            f"Invalid serialisation factor {factor} for {mode.name}: it must divide axis {name} "
            f"of length {length} (lhs {tuple(lhs.shape)}, rhs {tuple(rhs.shape)})"
        )


def identity_loss(x: Tensor, reduction: str) -> Tensor:
    """Mark a tensor as the loss.

    Raises:
        AssertionError: The reduction is not "sum", "mean" or "none".
    """
    require(
        reduction in ("sum", "mean", "none"),
        f"Unsupported reduction type {reduction!r}; use 'sum', 'mean' or 'none'",
    )
    if reduction == "none":
        loss = _same(x)
    else:
        loss = torch.sum(x) if reduction == "sum" else torch.mean(x)
    tracing.note_loss(loss, "identity_loss")
    return loss


def _same(x: Tensor) -> Tensor:
    # A tensor of its own: the loss must not be the same object as what feeds it.
    return x * 1.0 if x.is_floating_point() else x.clone()


def set_available_memory(tensor: Tensor, available_memory_proportion: float) -> Tensor:
    """Give the operation that made ``tensor`` a share of memory; use what is returned."""
    require_type(tensor, Tensor, "set_available_memory's tensor")
    require_type(available_memory_proportion, float, "set_available_memory's proportion")
    return tensor


def set_overlap_for_input(tensors: Any, mode: OverlapMode) -> Any:
    """Overlap the copy of inputs with compute."""
    require_type(mode, OverlapMode, "set_overlap_for_input's mode")
    return map_leaves(lambda tensor: tracing.overlapped("input", tensor, mode), tensors)


def set_overlap_for_output(tensors: Any, mode: OverlapMode) -> Any:
    """Overlap the copy of outputs with compute."""
    require_type(mode, OverlapMode, "set_overlap_for_output's mode")
    return map_leaves(lambda tensor: tracing.overlapped("output", tensor, mode), tensors)


def nop(tensor: Tensor) -> Tensor:
    """Return the tensor."""
    require_type(tensor, Tensor, "nop's tensor")
    return tensor


def ipu_print_tensor(tensor: Tensor, title: str = "", *_format: Any) -> Tensor:
    """Return the tensor; the device would print it."""
    require_type(tensor, Tensor, "ipu_print_tensor's tensor")
    require_type(title, str, "ipu_print_tensor's title")
    return tensor


def dynamic_slice(tensor: Tensor, dim: int, start: Any, size: int, step: int) -> Tensor:
    """Return a slice whose start is a tensor."""
    indices = torch.arange(0, size, step) + start
    return torch.index_select(tensor, dim, indices)


def dynamic_update(input: Tensor, src: Tensor, dim: int, start: Any, size: int) -> Tensor:
    """Return ``input`` with a slice replaced."""
    return torch.index_copy(input, dim, torch.arange(0, size) + start, src)


def custom_op(
    inputs: Any,
    name: str,
    domain: str,
    domain_version: int,
    example_outputs: Any,
    attributes: dict[str, Any] | None = None,
) -> list[Tensor]:
    """Return zeros shaped as the examples, as the front end does on the CPU.

    Raises:
        ValueError: An attribute is of an unsupported kind.
    """
    del inputs, domain_version
    for key, value in (attributes or {}).items():
        _check_attribute(key, value)
    tracing.note_custom_op(f"{domain}.{name}")
    return [torch.zeros_like(example) for example in example_outputs]


def _check_attribute(key: Any, value: Any) -> None:
    if not isinstance(key, str) or any(ord(letter) > 127 for letter in key):
        raise ValueError(f"Attribute names of custom_op must be ASCII text, got {key!r}")
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    kinds = {type(item) for item in values}
    if len(kinds) != 1 or not kinds <= {float, int, str}:
        raise ValueError(
            f"Attribute {key!r} of custom_op must be a float, int, str or a list of one of "
            f"these, got {value!r}"
        )


def for_loop(count: int, body: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Call ``body`` so many times, each on the results of the last; inference only."""
    require_type(count, int, "for_loop's count")
    require(callable(body), "for_loop's body must be callable")
    require_type(inputs, list, "for_loop's inputs")
    tracing.refuse_in_training("for_loop")
    values = list(inputs)
    for _ in range(count):
        result = body(*values)
        values = list(result) if isinstance(result, (list, tuple)) else [result]
    return values


def cond(
    condition: Tensor,
    then_body: Callable[..., Any],
    then_inputs: list[Tensor],
    else_body: Callable[..., Any],
    else_inputs: list[Tensor],
) -> list[Tensor]:
    """Compute both branches and choose by ``condition``; inference only."""
    require_type(condition, Tensor, "cond's condition")
    tracing.refuse_in_training("cond")
    first, second = _as_list(then_body(*then_inputs)), _as_list(else_body(*else_inputs))
    return [torch.where(condition, a, b) for a, b in zip(first, second)]


def _as_list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


class CPU:
    """Run a callable on the host, forward only.

    Args:
        layer_to_call: Module or callable; its parameters stop requiring gradients.
        ID: Name of the operation.
    """

    def __init__(self, layer_to_call: Callable[..., Any], ID: str) -> None:
        self._layer = layer_to_call
        self._id = ID
        if isinstance(layer_to_call, nn.Module):
            layer_to_call.requires_grad_(False)

    def __call__(self, *inputs: Any) -> Any:
        """Call the layer."""
        return tracing.host_call(self._layer, inputs)


class NameScope:
    """Prefix the names of operations."""

    def __init__(self, name: str) -> None:
        require_type(name, str, "NameScope's name")
        self.name = name

    def __enter__(self) -> NameScope:
        return self

    def __exit__(self, *_exception: Any) -> None:
        return None


class MultiConv:
    """Run independent convolutions at the same time."""

    def __enter__(self) -> MultiConv:
        return self

    def __exit__(self, *_exception: Any) -> None:
        return None


class Attribute:
    """Give operations attributes, e.g. ``Attribute(__outline={"layer": "embedding"})``."""

    def __init__(self, **attributes: dict[str, str]) -> None:
        self._values: list[tuple[str, str, str]] = []
        for group, values in attributes.items():
            require_type(values, dict, f"Attribute's {group}")
            for key, value in values.items():
                require_type(value, str, f"Attribute's {group}[{key!r}]")
                self._values.append((group, key, value))

    def __enter__(self) -> Attribute:
        tracing.note_attributes(self._values)
        return self

    def __exit__(self, *_exception: Any) -> None:
        return None
