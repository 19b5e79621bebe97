"""The C++ sources have the project's format, and the formatter is really asked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.gates.planted import run

pytest.importorskip("clang_format", reason="clang-format is a development dependency")
SUFFIXES = {".cpp", ".h", ".hpp"}


def clang_format(root: Path, folder: Path):
    files = [str(path) for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES]
    return run(root, "clang-format", "--dry-run", "-Werror", *files)


def test_kernels_have_the_format(root: Path) -> None:
    result = clang_format(root, root / "kernels")
    assert result.returncode == 0, result.stderr


def test_planted_fault_is_caught(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / ".clang-format", tmp_path)
    (tmp_path / "planted.cpp").write_text("int  main( ){return 0 ;}\n")
    result = clang_format(tmp_path, tmp_path)
    assert result.returncode != 0
    assert "planted.cpp:1" in result.stderr
