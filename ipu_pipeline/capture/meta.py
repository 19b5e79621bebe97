"""What is remembered of a traced tensor, and the tensors of a model's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ipu_pipeline.errors import CaptureError


@dataclass(frozen=True)
class TensorMeta:
    """Shape, dtype (torch name without prefix) and gradient flag of a traced value."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        """Describe ``tensor``."""
        return cls(
            tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad
        )


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors that ``module`` keeps as plain attributes, also in lists and maps."""
    return [value for value in own_values(module) if isinstance(value, Tensor)]


def own_values(module: nn.Module) -> list[Any]:
    """Return what ``module`` keeps as plain attributes, also in lists and maps."""
    values: list[Any] = list(vars(module).values())
    for value in [v for v in values if isinstance(v, Mapping | list | tuple)]:
        values.extend(value.values() if isinstance(value, Mapping) else value)
    return values


def named_tensors(output: Any) -> list[tuple[str, Tensor]]:
    """Return the direct tensor members of a model's output, by field name or position.

    Raises:
        CaptureError: The output is neither a tensor nor a tuple, list or mapping.
    """
    if isinstance(output, Tensor):
        return [("loss" if output.ndim == 0 else "output", output)]
    if isinstance(output, Mapping):
        return [(str(key), value) for key, value in output.items() if isinstance(value, Tensor)]
    if isinstance(output, tuple | list):
        names = [
            "loss" if i == 0 and getattr(v, "ndim", 1) == 0 else f"output_{i}"
            for i, v in enumerate(output)
        ]
        return [(n, v) for n, v in zip(names, output, strict=True) if isinstance(v, Tensor)]
    raise CaptureError(
        f"the model returns a {type(output).__name__}; it must return a tensor, a tuple or a "
        "mapping of tensors"
    )
