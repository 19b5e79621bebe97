"""The recording that runs now, if any: what blocks and ``poptorch``'s operations tell it."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

from .enums import OverlapMode
from .errors import createPoptorchError
from .graph import replaced, without_values, zeros_for
from .program import SerializedMatMul
from .recorder import Recorder

_current: list[Recorder] = []


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Make ``recorder`` the current one while this lasts."""
    _current.append(recorder)
    try:
        with recorder.recording():
            yield
    finally:
        _current.pop()


def _recorder() -> Recorder | None:
    return _current[-1] if _current else None


def is_running() -> bool:
    """Tell whether a model is recorded as the device's program now."""
    return bool(_current)


def begin_block(user_id: Any, ipu_id: int | None) -> Any:
    """Start a block and return its id; ``None`` stays ``None`` outside a recording."""
    return _current[-1].begin_block(user_id, ipu_id) if _current else user_id


def end_block() -> None:
    """Leave the block that is active."""
    if _current:
        _current[-1].end_block()


def restart_ids() -> None:
    """Number anonymous blocks from 0 again."""
    recorder = _recorder()
    if recorder is not None:
        recorder.restart_ids()


def note_checkpoints(count: int) -> None:
    """Record checkpointed tensors in the block that runs now."""
    recorder = _recorder()
    if recorder is not None:
        recorder.block.checkpoints += count


def note_loss(loss: Tensor, name: str) -> None:
    """Record a loss that no function of torch computed."""
    if _current:
        _current[-1].note_loss(loss, name)


def note_serialized(mode: str, factor: int, lhs: Tensor, rhs: Tensor) -> None:
    """Record a matrix product in slices."""
    recorder = _recorder()
    if recorder is not None:
        made = SerializedMatMul(mode, factor, tuple(lhs.shape), tuple(rhs.shape))
        recorder.block.serialized.append(made)


def note_attributes(values: list[tuple[str, str, str]]) -> None:
    """Record attributes given to the operations of the block that runs now."""
    recorder = _recorder()
    if recorder is not None:
        recorder.block.attributes.extend(values)


def note_custom_op(name: str) -> None:
    """Record a custom operation."""
    recorder = _recorder()
    if recorder is not None:
        recorder.program.custom_ops.append(name)


def overlapped(what: str, tensor: Any, mode: OverlapMode) -> Any:
    """Record that copies of an ``input`` or ``output`` overlap with compute; return the tensor.

    Raises:
        Error: It is no tensor.
    """
    if not isinstance(tensor, Tensor):
        raise createPoptorchError(
            f"You may only set overlap for tensors, {type(tensor)} is not supported"
        )
    recorder = _recorder()
    if recorder is None:
        return tensor
    program = recorder.program
    program.overlapped |= mode is not OverlapMode.NoOverlap
    made = tensor.clone()  # an operation of its own: what uses the tensor itself is another one
    slot = recorder.slot_of(tensor if what == "input" else made)
    program.overlaps.append((what, slot))
    return made


def refuse_in_training(what: str) -> None:
    """Refuse an operation that has no gradient on the device.

    Raises:
        Error: A training program runs.
    """
    if _current and _current[-1].program.training:
        raise createPoptorchError(f"{what} is supported in inference models only")


def host_call(layer: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """Call a layer of the host inside a program: one operation, computed without gradients.

    It runs once on zeros, which gives the shapes of its results.
    """
    recorder = _recorder()
    if recorder is None or recorder.is_paused:
        return layer(*inputs)
    state: dict[str, Tensor] = {}
    if isinstance(layer, nn.Module):
        state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}

    def call(state: dict[str, Tensor], *values: Any) -> Any:
        with torch.no_grad():
            if isinstance(layer, nn.Module):
                return torch.func.functional_call(layer, state, values)
            return layer(*values)

    with recorder.paused():
        made = call(*replaced((state, *inputs), zeros_for))
        result = replaced(made, without_values)
    recorder.add(call, "CPU", (state, *inputs), {}, result)
    return result
