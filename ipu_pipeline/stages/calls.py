"""Calls of a model's own methods, as a user would make them: ``generate``, ``forward``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.devices import on_device

States = list[Tensor]
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def check_call(model: nn.Module, name: str) -> None:
    """Refuse to generate with a model that does not.

    Raises:
        LoweringError: It has no ``generate``.
    """
    can_generate = getattr(model, "can_generate", None)
    if name == "generate" and (can_generate is None or not can_generate()):
        raise LoweringError(
            f"{type(model).__name__} does not generate: transformers has no generate for it; use "
            "a class with a language model's head, or forward and eval_step"
        )


def called(model: nn.Module, name: str, call: Call, device: torch.device) -> Any:
    """Call ``forward`` (with its hooks) or another method of a model, inputs on its device."""
    method = model if name == "forward" else getattr(model, name)
    args, kwargs = call
    given = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    return method(*given, **on_device(kwargs, device))


def called_in_turn(
    model: nn.Module, name: str, calls: Sequence[Call], device: torch.device
) -> list[Any]:
    """Return the results of calls, each of which draws as if it were alone."""
    states = generator_states(device)
    results = []
    for call in calls:
        set_generators(states, device)
        results.append(called(model, name, call, device))
    return results


def generator_states(device: torch.device) -> States:
    """Return the states of torch's generators, of the CPU and of a device."""
    on_gpu = device.type == "cuda"
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]


def set_generators(states: States, device: torch.device) -> None:
    """Set the states of torch's generators."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
