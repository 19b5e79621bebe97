"""The stand-in, installed as ``poptorch`` for one test."""

from __future__ import annotations

import pytest

from ipu_pipeline.targets.poptorch import standin


@pytest.fixture
def poptorch():
    with standin.install() as module:
        yield module
