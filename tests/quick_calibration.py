"""Let this machine be described in no time, by measurements too small to mean anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipu_pipeline.backends.local.measure import blocks, machine

if TYPE_CHECKING:
    import pytest


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink everything that ``local_machine`` measures, and what lies between runs of blocks."""
    monkeypatch.setattr(blocks, "OTHER_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "MATRIX_SIZE", 64)
    monkeypatch.setattr(machine, "COPY_ELEMENTS", 1 << 16)
    monkeypatch.setattr(machine, "PRODUCT_SIZES", (8, 16))
    monkeypatch.setattr(machine, "COPY_SIZES", (1 << 8, 1 << 12))
    monkeypatch.setattr(machine, "ATTENTION", (1, 2, 8, 4))
    for name in ("ROWS", "WIDTH"):
        monkeypatch.setattr(machine, name, 16)
