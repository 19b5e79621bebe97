"""Guards: a value that Python read from a tensor is specialised, and checked on every batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ipu_pipeline.capture.calls import attribute_name
from ipu_pipeline.errors import GuardError

# Calls that turn tensor values into Python values.
VALUE_READS = frozenset(
    {
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__index__,
        Tensor.__complex__,
        Tensor.__array__,
        Tensor.__contains__,
        Tensor.equal,
        Tensor.allclose,
        Tensor.is_nonzero,
        torch.equal,
        torch.allclose,
        torch.is_nonzero,
    }
)
_LONGEST_SHOWN = 60


class ValueGuard(torch.nn.Module):
    """Repeats a value ``read`` and refuses a batch for which it does not give ``expected``."""

    def __init__(self, read: Any, expected: Any, origin: str) -> None:
        super().__init__()
        self.read = read
        self.expected = expected
        self.origin = origin
        self.enabled = True

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Check the value.

        Raises:
            GuardError: It differs from the captured one.
        """
        if not self.enabled:
            return
        found = self.read(*args, **kwargs)
        if not _same(found, self.expected):
            raise GuardError(
                f"{self.origin} reads a tensor in Python ({name_of(self.read)}): it was "
                f"{_short(self.expected)} when the model was captured and is {_short(found)} for "
                "this batch, so that the model might take another branch; capture it again with "
                "this batch, or keep the module that reads the value inside a block"
            )


@contextlib.contextmanager
def unguarded(module: torch.nn.Module) -> Iterator[None]:
    """Switch the guards in ``module`` off: it runs on tensors that have no meaningful values."""
    guards = [child for child in module.modules() if isinstance(child, ValueGuard)]
    for guard in guards:
        guard.enabled = False
    try:
        yield
    finally:
        for guard in guards:
            guard.enabled = True


def name_of(function: Any) -> str:
    """Return a readable name of a torch function."""
    if getattr(function, "__name__", "") == "__get__":
        return f"Tensor.{attribute_name(function)}"
    name = getattr(function, "__qualname__", None) or repr(function)
    return str(name).replace("TensorBase.", "Tensor.")


def _same(found: Any, expected: Any) -> bool:
    if hasattr(expected, "shape"):  # numpy arrays
        return bool(found.shape == expected.shape and (found == expected).all())
    both_nan = found != found and expected != expected
    return bool(found == expected or both_nan)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
