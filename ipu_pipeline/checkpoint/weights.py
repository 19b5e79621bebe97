"""The model's part of a checkpoint: one safetensors file that ``from_pretrained`` reads too."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ipu_pipeline.checkpoint.manifest import files_of
from ipu_pipeline.checkpoint.slices import UNCUT, Slices
from ipu_pipeline.errors import CheckpointError, shown
from ipu_pipeline.ir.codec import parse_json

_EXTRA_STATE = "_extra_state"
logger = logging.getLogger(__name__)

WEIGHTS = "model"
# What a transformers model leaves out of its own file (Marian's position tables, for one).
LEFT_OUT = "model.left_out"
# Set by saving or loading, without influence on what is computed.
_NOT_SETTINGS = frozenset({"_name_or_path", "architectures", "dtype", "transformers_version"})


def weights_to_save(model: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the model's tensors for its own file, and those it leaves out; of tied ones one.

    Names are those of the model in memory, so that loading needs no conversion
    (``from_pretrained`` accepts them as well).
    """
    targets: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = tensors_of(model)
    kept: dict[str, Tensor] = {}
    left_out: dict[str, Tensor] = {}
    for names in tied_names(model):
        name = next((n for n in names if n not in targets), names[0])
        (left_out if ignored.intersection(names) else kept)[name] = state[name]
    return kept, left_out


def save_settings(model: torch.nn.Module, folder: Path) -> None:
    """Write what ``save_pretrained`` adds to the weights of a transformers model."""
    if isinstance(model, PreTrainedModel):
        bar_was_on = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            model.save_pretrained(folder, state_dict={}, save_original_format=False)
        finally:
            if bar_was_on:
                transformers_logging.enable_progress_bar()


def read_weights(
    model: torch.nn.Module,
    folder: Path,
    files: Iterable[str],
    is_held: Callable[[str], bool] = lambda _: True,
    slices: Slices = UNCUT,
) -> dict[str, Tensor]:
    """Read the weights and check that they fill ``model`` exactly; change nothing.

    Args:
        model: What they are for.
        folder: Where the files are.
        files: Names of the checkpoint's files.
        is_held: Whether a tensor of the state dict is needed; of tied ones any is.
        slices: What is kept of each.

    Raises:
        CheckpointError: A tensor is missing, unknown or of another shape.
    """
    state, groups = tensors_of(model), tied_names(model)
    needed = {name for names in groups if any(map(is_held, names)) for name in names}
    tensors: dict[str, Tensor] = {}
    whole: dict[str, torch.Size] = {}
    present: set[str] = set()
    for file in (*files_of(WEIGHTS, files), *files_of(LEFT_OUT, files)):
        with safe_open(folder / file, framework="pt") as opened:
            present.update(opened.keys())
            for name in needed.intersection(opened.keys()):
                tensor = opened.get_tensor(name)
                whole[name] = tensor.shape
                tensors[name] = slices.part(state[name], tensor) if name in state else tensor
    missing = [names[0] for names in groups if not present & set(names)]
    unknown = [name for name in present if name not in state]
    shapes = [
        f"{name} is {tuple(shape)} in the checkpoint and {tuple(slices.shape(state[name]))} here"
        for name, shape in whole.items()
        if name in state and shape != slices.shape(state[name]) and not name.endswith(_EXTRA_STATE)
    ]
    kinds = [
        f"{name} is {tensor.dtype} in the checkpoint and {state[name].dtype} here"
        for name, tensor in tensors.items()
        if name in state and not name.endswith(_EXTRA_STATE) and _kind(tensor) != _kind(state[name])
    ]
    problems = [f"{n} is missing" for n in missing] + [f"{n} is unknown" for n in unknown]
    problems += shapes + kinds
    if problems:
        raise CheckpointError(
            f"the weights in {folder} do not fit {type(model).__name__}: "
            f"{'; '.join(problems[:3])}; load it into the model it was written for"
        )
    return tensors


def check_extra_state(found: Mapping[str, Any], model: torch.nn.Module) -> None:
    """Refuse what is no extra state of a module, such as another value of a weight.

    Raises:
        ValueError: There is such a name.
    """
    known = model.state_dict(keep_vars=True)
    for name in found:
        if name not in known or not name.endswith(_EXTRA_STATE):
            raise ValueError(f"no module of this model has the extra state {shown(name)}")


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    """Return what two dtypes have in common if numbers of one can be put into the other."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def fingerprint(model: torch.nn.Module, slices: Slices = UNCUT) -> dict[str, Any]:
    """Return what identifies a model: its class, and its parameters' names and shapes."""
    return {
        "class": type(model).__name__,
        "parameters": {name: list(slices.shape(p)) for name, p in model.named_parameters()},
    }


def check_fingerprint(
    saved: Mapping[str, Any], model: torch.nn.Module, folder: Path, slices: Slices = UNCUT
) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointError: Names the first parameters that differ.
    """
    own = fingerprint(model, slices)
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
    for name, tensor in tensors_of(model).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the model's state dict, parameters as they are."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def extra_state(model: torch.nn.Module) -> dict[str, Any]:
    """Return what modules' ``get_extra_state`` adds to the state dict and is no tensor.

    Raises:
        CheckpointError: It is not JSON data, and nothing is pickled.
    """
    state = model.state_dict(keep_vars=True)
    found = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    for name, value in found.items():
        problem = "not the same after it was written and read"
        try:
            same = parse_json(json.dumps(value), any_number=True) == value
        except (TypeError, ValueError) as error:
            same, problem = False, str(error)
        if not same:
            raise CheckpointError(
                f"{name} of {type(model).__name__} cannot be kept in a checkpoint ({problem}); "
                "let get_extra_state return a tensor, or lists, texts, numbers and dicts with "
                "texts as keys"
            )
    return found
