"""Exceptions of the front end, and the two ways in which it makes one."""

from __future__ import annotations


class Error(Exception):
    """Anything poptorch refuses.

    Attributes:
        type: Which part refused: ``poptorch_py_error`` or ``poptorch_cpp_error``.
        message: What was refused, without the prefix that ``str()`` adds.
        location: Where in the back end; empty for the Python side.
    """

    type = "poptorch_cpp_error"
    message = ""
    location = ""


class RecoverableError(Error):
    """The device can be used again after ``recovery_action``."""

    recovery_action = ""


class UnrecoverableError(Error):
    """The machine has to be restarted."""


class ConfigFileError(Exception):
    """A file given to ``Options.loadFromFile`` cannot be read."""


def createPoptorchError(message: str) -> Error:
    """Return the error of a check on the Python side."""
    return _make("poptorch_py_error", message)


def backend_error(message: str) -> Error:
    """Return the error of a check that the compiled back end makes while it compiles."""
    return _make("poptorch_cpp_error", message)


def _make(kind: str, message: str) -> Error:
    error = Error(f"'{kind}': {message}")
    error.type = kind
    error.message = message
    return error
