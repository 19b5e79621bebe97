"""The rows that a bundle trains on: read from a file, or made up to measure speed."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import torch
from torch import Tensor


def read_data(path: str, call_size: int) -> dict[str, Tensor]:
    """Read a ``torch.save``d dict of tensors whose axis 0 are the rows.

    Raises:
        ValueError: It is no such dict, or holds fewer rows than one call of the device takes.
    """
    data = torch.load(path, map_location="cpu")
    if not isinstance(data, dict) or not all(isinstance(v, Tensor) for v in data.values()):
        raise ValueError(f"{path} must hold a dict of tensors by the model's input names")
    rows = {name: len(value) for name, value in data.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(f"{path}: the tensors have different numbers of rows: {rows}")
    if next(iter(rows.values())) < call_size:
        raise ValueError(
            f"{path} has {next(iter(rows.values()))} rows, one call of the device takes "
            f"{call_size} = micro batch x accumulation x replicas x iterations; give more rows"
        )
    return data


def synthetic_data(inputs: Sequence[Mapping[str, Any]], rows: int, seed: int) -> dict[str, Tensor]:
    """Return random rows in the shapes of the plan: zeros and ones, or normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    data = {}
    for spec in inputs:
        shape = (rows, *spec["shape"][1:])
        dtype = getattr(torch, spec["dtype"])
        if dtype.is_floating_point:
            data[spec["name"]] = torch.randn(shape, generator=generator).to(dtype)
        else:
            data[spec["name"]] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return data


def mean_loss(losses: Tensor, settings: Mapping[str, Any]) -> float:
    """Return one number for the losses of one call: the mean of what the device gave back.

    That is the mean over all microbatches under the output modes ``all`` and ``sum``, and over the
    last microbatch of every replica under ``final`` and ``default``.
    """
    mean = float(losses.float().mean())
    if settings["output_mode"] == "sum":
        mean /= settings["gradient_accumulation_steps"] * settings["device_iterations"]
    return mean
