"""Fixtures of the operations that have a C++ kernel."""

from __future__ import annotations

import pytest

from ipu_pipeline.ops import extension


@pytest.fixture
def kernel() -> None:
    """Skips where there is no library."""
    if not extension.state().usable:
        pytest.skip(extension.state().detail)
