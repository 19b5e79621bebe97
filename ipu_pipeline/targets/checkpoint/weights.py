"""The model's part of a checkpoint: one safetensors file that ``from_pretrained`` reads too."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ipu_pipeline.errors import CheckpointError

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
# What a transformers model leaves out of its own file (Marian's position tables, for one).
LEFT_OUT = "model.left_out.safetensors"
_ONE_FILE_BYTES = 1 << 60
# Set by saving or loading, without influence on what is computed.
_NOT_SETTINGS = frozenset({"_name_or_path", "architectures", "dtype", "transformers_version"})


def save_weights(model: torch.nn.Module, folder: Path) -> None:
    """Write weights and, for a transformers model, its configuration into ``folder``.

    Of tied tensors one is written. Names are those of the model in memory, so that loading
    needs no conversion (``from_pretrained`` accepts them as well).
    """
    if isinstance(model, PreTrainedModel):
        bar_was_on = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            model.save_pretrained(
                folder, max_shard_size=_ONE_FILE_BYTES, save_original_format=False
            )
        finally:
            if bar_was_on:
                transformers_logging.enable_progress_bar()
        written = _names(folder / WEIGHTS)
    else:
        written = set()
    groups = tied_names(model)
    state = model.state_dict()
    rest = {names[0]: state[names[0]].contiguous() for names in groups if written.isdisjoint(names)}
    if rest:
        save_file(rest, folder / (LEFT_OUT if written else WEIGHTS), metadata={"format": "pt"})


def load_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into the model's own parameters and buffers, in place."""
    model.load_state_dict(dict(tensors), strict=False)


def read_weights(model: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    """Read the weights and check that they fill ``model`` exactly; change nothing.

    Raises:
        CheckpointError: A tensor is missing, unknown or of another shape.
    """
    tensors: dict[str, Tensor] = {}
    for name in (WEIGHTS, LEFT_OUT):
        if (folder / name).is_file():
            tensors |= load_file(folder / name)
    state = model.state_dict()
    missing = [names[0] for names in tied_names(model) if not tensors.keys() & set(names)]
    unknown = [name for name in tensors if name not in state]
    shapes = [
        f"{name} is {tuple(tensor.shape)} in the checkpoint and {tuple(state[name].shape)} here"
        for name, tensor in tensors.items()
        if name in state and tensor.shape != state[name].shape
    ]
    problems = [f"{n} is missing" for n in missing] + [f"{n} is unknown" for n in unknown] + shapes
    if problems:
        raise CheckpointError(
            f"the weights in {folder} do not fit {type(model).__name__}: "
            f"{'; '.join(problems[:3])}; load it into the model it was written for"
        )
    return tensors


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """Return what identifies a model: its class, and its parameters' names and shapes."""
    return {
        "class": type(model).__name__,
        "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
    }


def check_fingerprint(saved: Mapping[str, Any], model: torch.nn.Module, folder: Path) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointError: Names the first parameters that differ.
    """
    own = fingerprint(model)
    if saved == own:
        return
    theirs, ours = saved["parameters"], own["parameters"]
    names = [n for n in [*ours, *theirs] if theirs.get(n) != ours.get(n)]
    lines = [
        f"{n} is {theirs.get(n, 'absent')} in the checkpoint and {ours.get(n, 'absent')} here"
        for n in dict.fromkeys(names)
    ]
    more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
    what = "; ".join(lines[:3]) + more if lines else "the parameters agree"
    raise CheckpointError(
        f"{folder} is a checkpoint of {saved['class']}, the model is {own['class']}: {what}; "
        "build the model as it was when the checkpoint was written"
    )


def warn_of_other_settings(model: torch.nn.Module, folder: Path) -> None:
    """Log the settings of a transformers model that differ from the checkpoint's.

    Parameters of the same shapes can compute something else: another number of attention heads,
    another activation. Some changes are meant (dropout), so this is no error.
    """
    if not isinstance(model, PreTrainedModel) or not (folder / "config.json").is_file():
        return
    saved = type(model.config).from_pretrained(folder).to_dict()
    own = model.config.to_dict()
    changed = [
        f"{name} was {saved.get(name)!r} and is {value!r}"
        for name, value in own.items()
        if name not in _NOT_SETTINGS and saved.get(name) != value
    ]
    if changed:
        logger.warning(
            "the model is configured otherwise than in %s: %s", folder, "; ".join(changed)
        )


def tied_names(model: torch.nn.Module) -> list[list[str]]:
    """Return the names of the state dict, those of one and the same tensor together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _names(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())
