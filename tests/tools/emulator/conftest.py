"""The stand-in, installed as ``poptorch`` for one test."""

from __future__ import annotations

import pytest

import ipu_pipeline_emulator as standin


@pytest.fixture
def poptorch():
    with standin.install() as module:
        yield module
