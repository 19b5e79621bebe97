"""Both implementations of an operation: its C++ kernel, and plain torch."""

from __future__ import annotations

from types import ModuleType

import pytest

BOTH = ("kernel", "plain torch")


def choose(
    path: object, module: ModuleType, request: pytest.FixtureRequest, patch: pytest.MonkeyPatch
) -> bool:
    """Run the operation of ``module`` on its kernel, or skip; on plain torch for other paths."""
    if path == "kernel":
        request.getfixturevalue("kernel")
    else:
        patch.setattr(module, "_kernels", lambda *_: False)
    return path == "kernel"
