"""What is said when a model does what no device program can do."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from typing import Any, Optional

from .checks import BundleError

_HERE = str(Path(__file__).resolve().parent)
_OTHERS = ("torch", "poptorch", "contextlib.py", "functools.py")


class StaticGraphError(BundleError):
    """The model does something that has no place in a program that is compiled once."""


def refuse(what: str, remedy: str) -> StaticGraphError:
    """Return the error that names the line of the model, what it does and the remedy."""
    return StaticGraphError(f"{place()}: {what}; {remedy}")


def place() -> str:
    """Return file, line and text of the innermost statement that is the model's own."""
    frame: Optional[Any] = sys._getframe(1)
    while frame is not None and _is_machinery(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "the model"
    path, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(path, line).strip()
    return f"{Path(path).name}:{line} ({text})" if text else f"{Path(path).name}:{line}"


def _is_machinery(path: str) -> bool:
    parts = Path(path).parts
    if path.startswith((_HERE, "<")) or "emulator" in Path(path).parent.name:
        return True
    return any(name in parts for name in _OTHERS)
