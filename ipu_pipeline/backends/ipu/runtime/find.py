"""Find the modules that a plan names, also where this transformers version names them otherwise."""

from __future__ import annotations

import difflib
from typing import Mapping, Sequence, Tuple

from torch import nn

Structure = Tuple[Tuple[str, str], ...]


class ModuleNotFound(LookupError):
    """A module that the plan names is not in the model."""


def find_modules(
    model: nn.Module, paths: Sequence[str], planned_parameters: Mapping[str, str]
) -> dict[str, nn.Module]:
    """Return the module of every path.

    A path that the model does not have is matched by structure: the modules whose parameters have
    the same names below them and the same shapes, or at least the same shapes, in the order of the
    model, one to one.

    Args:
        model: The model.
        paths: Dotted paths of the plan, in its order.
        planned_parameters: ``shape dtype`` text by parameter name of the planned model, such as
            ``384x384 float32``.

    Returns:
        The module by path.

    Raises:
        ModuleNotFound: No module, or not as many as the plan names, have that structure.
    """
    # One module object may have several paths (T5's embedding, in older versions).
    here = dict(model.named_modules(remove_duplicate=False))
    found = {path: here[path] for path in paths if path in here}
    missing = [path for path in paths if path not in here]
    groups: dict[Structure, list[str]] = {}
    for path in missing:
        groups.setdefault(_planned_structure(path, planned_parameters), []).append(path)
    taken = {id(module) for module in found.values()}
    free = [module for module in model.modules() if id(module) not in taken]
    for structure, members in groups.items():
        candidates = [m for m in free if structure and _structure(m) == structure]
        if not candidates:  # parameters were renamed, too
            shapes = _shapes(structure)
            candidates = [m for m in free if shapes and _shapes(_structure(m)) == shapes]
        if len(candidates) != len(members):
            raise ModuleNotFound(_message(members, candidates, here))
        found.update(zip(members, candidates))
    return found


def _shapes(structure: Structure) -> tuple[str, ...]:
    return tuple(sorted(shape for _, shape in structure))


def _planned_structure(path: str, planned_parameters: Mapping[str, str]) -> Structure:
    below = {
        name[len(path) + 1 :]: text.split(" ")[0]
        for name, text in planned_parameters.items()
        if name.startswith(path + ".")
    }
    return tuple(sorted(below.items()))


def _structure(module: nn.Module) -> Structure:
    shapes = {
        name: "x".join(str(size) for size in parameter.shape) or "scalar"
        for name, parameter in module.named_parameters()
    }
    return tuple(sorted(shapes.items()))


def _message(
    members: Sequence[str], candidates: Sequence[nn.Module], here: Mapping[str, nn.Module]
) -> str:
    close = difflib.get_close_matches(members[0], list(here), n=3)
    hint = "; close names: " + ", ".join(close) if close else ""
    return (
        f"the model has no module {members[0]!r}, and {len(candidates)} modules of its structure "
        f"for {len(members)} that the plan names{hint}; use the transformers version the plan was "
        "made with, or correct the paths"
    )
