"""Optimizer state keyed by parameter name, so that any grouping of the parameters can load it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ipu_pipeline.checkpoint.manifest import (
    UNREADABLE,
    as_json_data,
    damaged,
    files_of,
    read_settings,
)
from ipu_pipeline.checkpoint.slices import UNCUT, Slices
from ipu_pipeline.errors import CheckpointError, shown
from ipu_pipeline.ops.master_weights import MASTER_WEIGHT, MasterWeights

OPTIMIZER = "optimizer"
SETTINGS = "optimizer.json"
# How the update is computed, not what it computes: the loading side decides.
_NOT_SAVED = frozenset(
    {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
)
_SEPARATOR = "/"


def optimizer_settings(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the kind of optimizer and its groups' settings, by parameter name, as JSON data.

    Args:
        optimizer: Over the model's parameters, or a part of them.
        model: The unsplit model.
        groups: All groups with all parameters; ``None`` for those that the optimizer has now.

    Raises:
        CheckpointError: The optimizer holds a parameter that is not the model's, or a setting
            that JSON cannot hold.
    """
    groups = optimizer.param_groups if groups is None else groups
    described = [
        {
            "parameters": members,
            "settings": {
                key: value.item() if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key not in _NOT_SAVED
            },
        }
        for group, members in zip(groups, _names(groups, model), strict=True)
    ]
    return _json_data({"class": type(optimizer).__name__, "groups": described}, optimizer)


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """Return the state that is here: tensors, and values that are none, by parameter name.

    Raises:
        CheckpointError: JSON cannot hold a value.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors.setdefault(name, {})[key] = value
            else:
                values.setdefault(name, {})[key] = value
    return tensors, _json_data(values, optimizer)


def tensor_key(name: str, key: str) -> str:
    """Return what the state ``key`` of a parameter is called in the file."""
    return f"{key}{_SEPARATOR}{name}"


def _json_data(content: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    kind = type(optimizer).__name__
    return as_json_data(
        content,
        f"{kind} has settings or state that JSON cannot hold ({{}}); use tensors, numbers or text",
    )


def read_optimizer(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    folder: Path,
    files: Iterable[str],
    is_held: Callable[[str], bool] = lambda _: True,
    slices: Slices = UNCUT,
) -> dict[str, Any]:
    """Return a state dict that ``optimizer.load_state_dict`` takes; change nothing.

    Args:
        optimizer: Over parameters of the model.
        model: The unsplit model.
        folder: Where the files are.
        files: Names of the checkpoint's files.
        is_held: Whether the state of a parameter is needed, by its name.
        slices: What is kept of each.

    Raises:
        CheckpointError: There is no optimizer state, it is of another kind of optimizer, it does
            not cover the same parameters, or one group would need two values of a setting.
    """
    content = _saved_settings(optimizer, folder)
    saved = {name: group["settings"] for group in content["groups"] for name in group["parameters"]}
    groups = _names(optimizer.param_groups, model)
    order = [name for group in groups for name in group]
    _check_same(saved.keys(), set(order), folder)
    state: dict[str, dict[str, Any]] = content["values"]
    parameters = dict(model.named_parameters())
    for file in files_of(OPTIMIZER, files):
        with safe_open(folder / file, framework="pt") as opened:
            for full_key in opened.keys():  # noqa: SIM118 - it is no mapping
                key, _, name = full_key.partition(_SEPARATOR)
                if name not in saved:
                    raise damaged(folder, f"no group has the parameter of {shown(full_key)}")
                if is_held(name):
                    value = opened.get_tensor(full_key)
                    if name in parameters:
                        value = slices.part(parameters[name], value)
                    state.setdefault(name, {})[key] = value
    indices = iter(range(len(order)))
    return {
        "state": {i: state[name] for i, name in enumerate(order) if name in state},
        "param_groups": [
            _merged(group, [saved[name] for name in members], folder)
            | {"params": [next(indices) for _ in members]}
            for group, members in zip(optimizer.param_groups, groups, strict=True)
        ],
    }


def _saved_settings(optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """Read what :func:`optimizer_settings` returned, of the same kind of optimizer."""
    if not (folder / SETTINGS).is_file():
        raise CheckpointError(
            f"{folder} holds no optimizer state, it was written without an optimizer; load it "
            "with optimizer=None to start the optimizer afresh"
        )
    content: dict[str, Any] = read_settings(folder / SETTINGS)
    if content["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"{folder} holds the state of {content['class']}, the optimizer is "
            f"{type(optimizer).__name__}; use the same optimizer, or load with optimizer=None"
        )
    return content


def _check_same(saved: Set[str], own: Set[str], folder: Path) -> None:
    if saved != own:
        raise CheckpointError(
            f"the optimizer state in {folder} covers other parameters: only there "
            f"{sorted(saved - own)[:3]}, only here {sorted(own - saved)[:3]}; train the same "
            "parameters, or load with optimizer=None"
        )


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    folder: Path,
    masters: MasterWeights | None = None,
) -> None:
    """Load what :func:`read_optimizer` returned; after an error the optimizer is as it was.

    Raises:
        CheckpointError: It is not the state that such an optimizer keeps, or has float32 copies
            of weights without ``masters``.
    """
    _check_masters(state["state"], masters, folder)
    for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        expected = {}
        for ndim in {parameter.ndim for parameter in own["params"]}:
            # With its own settings, which it has again once they are loaded.
            expected[ndim] = _state_after_a_step(optimizer, saved, ndim)
            if not expected[ndim] and _state_after_a_step(optimizer, own, ndim):
                raise damaged(folder, f"{type(optimizer).__name__} does not run with its settings")
        for number, parameter in zip(saved["params"], own["params"], strict=True):
            kept = state["state"].get(number, {})
            wrong = _difference(kept, expected[parameter.ndim], parameter.shape)
            if wrong:
                raise damaged(folder, f"the optimizer state of parameter {number} {wrong}")
    before = optimizer.state_dict()
    try:
        optimizer.load_state_dict(state)
    except UNREADABLE as error:
        optimizer.load_state_dict(before)
        raise damaged(folder, f"its optimizer state cannot be used ({error})") from error
    if masters is not None:  # torch has given every tensor the type of its weight
        masters.load(state)


def _check_masters(
    state: Mapping[Any, Mapping[str, Any]], masters: MasterWeights | None, folder: Path
) -> None:
    if masters is None and any(MASTER_WEIGHT in kept for kept in state.values()):
        raise CheckpointError(
            f"{folder} has float32 master weights, and the model is compiled without; compile it "
            "with master_weights=True, or load with optimizer=None"
        )


def _state_after_a_step(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], ndim: int
) -> dict[str, Any]:
    """Return what is kept of a parameter after a step with the settings of ``group``.

    Tensors of the parameter's shape are given as ``None``. Nothing if such an optimizer cannot be
    made from settings alone.
    """
    one = torch.nn.Parameter(torch.ones(tuple(range(2, 2 + ndim))))
    one.grad = torch.ones_like(one)
    known = inspect.signature(type(optimizer)).parameters
    alike = {**optimizer.defaults, **group, "params": [one], "fused": None, "foreach": None}
    settings = {k: v for k, v in alike.items() if k in known and k != "params"}
    try:  # the constructor looks at the settings that it is given besides the groups
        twin = type(optimizer)([alike], **settings)
        twin.step()
    except Exception:  # a setting is wrong, it needs more than settings, or a closure
        return {}
    same = (
        isinstance(value, Tensor) and value.shape == one.shape and value.is_floating_point()
        for value in twin.state[one].values()
    )
    return {
        name: None if is_same else value
        for (name, value), is_same in zip(twin.state[one].items(), same, strict=True)
    }


def _difference(kept: Mapping[str, Any], expected: Mapping[str, Any], shape: torch.Size) -> str:
    """Return how a parameter's state is not what its optimizer keeps; nothing if it is."""
    if MASTER_WEIGHT in kept and (expected or len(kept) == 1):  # alone: no step has succeeded yet
        expected = {**(expected if len(kept) > 1 else {}), MASTER_WEIGHT: None}
    if not kept or not expected:
        return ""
    if kept.keys() != expected.keys():
        return f"holds {', '.join(sorted(kept))} instead of {', '.join(sorted(expected))}"
    for name, value in expected.items():
        found = kept[name]
        if isinstance(found, Tensor) != (value is None or isinstance(value, Tensor)):
            return f"holds a {type(found).__name__} as {name}"
        if value is None and not found.is_floating_point():
            return f"has {name} of {found.dtype}"
        wanted = shape if value is None else getattr(value, "shape", ())
        if isinstance(found, Tensor) and (value is None or not wanted) and found.shape != wanted:
            return f"has {name} of shape {tuple(found.shape)} instead of {tuple(wanted)}"
    return ""


def _names(groups: Sequence[Mapping[str, Any]], model: torch.nn.Module) -> list[list[str]]:
    """Return the parameter names of every group."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    names = []
    for number, group in enumerate(groups):
        shapes = [tuple(p.shape) for p in group["params"] if id(p) not in known]
        if shapes:
            raise CheckpointError(
                f"group {number} of the optimizer holds a parameter of shape {shapes[0]} that is "
                f"not one of {type(model).__name__}'s; build the optimizer over model.parameters()"
            )
        names.append([known[id(p)] for p in group["params"]])
    return names


def _merged(group: dict[str, Any], saved: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Return a group's settings as saved; its own where nothing was saved."""
    own = {key: value for key, value in group.items() if key != "params"}
    for key in dict.fromkeys(key for settings in saved for key in settings):
        choices = [settings.get(key) for settings in saved]
        own[key] = _like(own.get(key), choices[0])
        if any(choice != choices[0] for choice in choices):
            raise CheckpointError(
                f"one group of the optimizer joins parameters that {folder} has under different "
                f"{key} ({choices[0]} and {next(c for c in choices if c != choices[0])}); keep "
                "parameters with different settings in different groups"
            )
    return own


def _like(own: Any, saved: Any) -> Any:
    """Return a saved setting in the type that the optimizer holds it in.

    Raises:
        TypeError: It is a number, or true or false, here or there only, finite here only, or
            there are more or fewer of them.
    """
    if isinstance(own, Tensor):
        return torch.full_like(own, saved)
    if isinstance(own, tuple) and isinstance(saved, list) and len(own) == len(saved):
        return tuple(_like(*pair) for pair in zip(own, saved, strict=True))
    numbers = isinstance(own, int | float), isinstance(saved, int | float)
    strange = isinstance(saved, float) and not math.isfinite(saved) and own != saved
    strange |= numbers[0] != numbers[1] or isinstance(own, bool) != isinstance(saved, bool)
    if own is not None and saved is not None and strange:
        raise TypeError(f"a setting of the optimizer is {own!r} here and {saved!r} there")
    return saved
