"""Puts the stand-in where ``import poptorch`` finds it, and takes it away again."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from typing import Iterator

from . import api

_SUBMODULES = ("optim", "options", "enums")


class StandInError(ImportError):
    """The stand-in cannot take the place of ``poptorch``."""


@contextlib.contextmanager
def install(*, force: bool = False) -> Iterator[types.ModuleType]:
    """Make ``import poptorch`` give the stand-in while the context lasts.

    Args:
        force: Hide the real front end, if there is one.

    Yields:
        The module; ``__version__`` ends in ``+standin``.

    Raises:
        StandInError: The real poptorch can be imported and ``force`` is off.
    """
    hidden = {name: module for name, module in sys.modules.items() if _is_poptorch(name)}
    if not force and _real_is_importable():
        raise StandInError(
            "the real poptorch can be imported here: use it, or pass force=True to hide it"
        )
    for name in hidden:
        del sys.modules[name]
    module = make_module()
    sys.modules["poptorch"] = module
    for name in _SUBMODULES:
        sys.modules[f"poptorch.{name}"] = getattr(module, name)
    try:
        yield module
    finally:
        for name in [name for name in sys.modules if _is_poptorch(name)]:
            del sys.modules[name]
        sys.modules.update(hidden)


def make_module() -> types.ModuleType:
    """Return a module with the public names and nothing else."""
    module = types.ModuleType(
        "poptorch", "ipu_pipeline's stand-in for Graphcore's poptorch: runs on the CPU, no IPU."
    )
    module.__spec__ = importlib.machinery.ModuleSpec("poptorch", None)
    module.__dict__.update(api.public_names())
    return module


def _is_poptorch(name: str) -> bool:
    return name == "poptorch" or name.startswith("poptorch.")


def _real_is_importable() -> bool:
    present = sys.modules.get("poptorch")
    if present is not None:
        return not is_stand_in(present)
    return importlib.util.find_spec("poptorch") is not None


def is_stand_in(module: types.ModuleType) -> bool:
    """Tell whether a ``poptorch`` module is the stand-in."""
    return str(getattr(module, "__version__", "")).endswith("+standin")
