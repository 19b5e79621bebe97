"""The folder of measurements is the user's own, or it is not used."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from ipu_pipeline.backends.local.measure import cache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_it_is_made_private(folder: Path) -> None:
    cache.store_measurements("speed", 3.5)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache.load_measurements("speed", float) == 3.5


@pytest.mark.parametrize("way", ["others can write", "another user's"])
def test_a_folder_of_others_is_neither_read_nor_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    cache.store_measurements("speed", 3.5)
    mine = folder.parent / "mine.txt"
    mine.write_text("mine", encoding="utf-8")
    (folder / "other.json").symlink_to(mine)
    if way == "others can write":
        folder.chmod(0o777)
    else:
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with caplog.at_level(logging.WARNING):
        assert cache.load_measurements("speed", float) is None
        cache.store_measurements("other", 1.0)
        with cache.one_process("other"):
            pass
    assert "make it private (chmod 700)" in caplog.text
    assert mine.read_text(encoding="utf-8") == "mine"


def test_nobody_needs_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(cache.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    cache.store_measurements("speed", 3.5)
    with cache.one_process("speed"):
        assert cache.load_measurements("speed", float) is None
