"""Every test of this folder runs with the stand-in as ``poptorch``."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

import ipu_pipeline_emulator as standin


@pytest.fixture
def poptorch() -> Iterator[ModuleType]:
    """Put the stand-in in the place of ``poptorch``."""
    with standin.install() as module:
        yield module
