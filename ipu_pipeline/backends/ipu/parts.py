"""A batch in parts: one call of the device, or the rest on the host, and the results together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipu_pipeline.stages.executable import EvalResult


@dataclass(frozen=True)
class Part:
    """Results of one call.

    Attributes:
        num_samples: Samples of the call.
        values: Tensors by name; ``loss`` has one entry per microbatch of equal size.
    """

    num_samples: int
    values: Mapping[str, Tensor]


def rows(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return the samples from ``start`` to ``stop``; what has no axis 0 goes whole."""
    return {
        name: value[start:stop] if isinstance(value, Tensor) and value.ndim else value
        for name, value in batch.items()
    }


def join(parts: Sequence[Part]) -> EvalResult:
    """Return the results of all parts: outputs joined on axis 0, the loss weighed by samples."""
    total = sum(part.num_samples for part in parts)
    loss = None
    if "loss" in parts[0].values:
        weighed = [float(p.values["loss"].float().mean()) * p.num_samples for p in parts]
        loss = sum(weighed) / total
    outputs = {
        name: torch.cat([part.values[name] for part in parts])
        for name in parts[0].values
        if name != "loss"
    }
    return EvalResult(loss, outputs)
