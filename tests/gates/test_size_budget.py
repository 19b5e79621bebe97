"""No source file is longer than the budget; the README says what to aim for (100 to 250)."""

from __future__ import annotations

from pathlib import Path

from tests.gates.planted import copy_package, plant

LIMIT = 600
FOLDERS = ("ipu_pipeline", "tests", "examples", "benchmarks", "kernels", "docs")
SUFFIXES = {".py", ".cpp", ".cc", ".hpp", ".h"}


def too_long(root: Path) -> list[str]:
    """Return ``file: lines`` for every source file over the budget."""
    found = []
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                lines = len(path.read_text(encoding="utf-8").splitlines())
                if lines > LIMIT:
                    found.append(f"{path.relative_to(root)}: {lines} lines")
    return found


def test_no_file_is_over_the_budget(root: Path) -> None:
    assert too_long(root) == []


def test_planted_long_files_are_caught(root: Path, tmp_path: Path) -> None:
    folder = copy_package(root, tmp_path)
    plant(folder, "errors.py", "# line\n" * LIMIT)
    (folder / "kernels").mkdir()
    (folder / "kernels" / "op.cpp").write_text("// line\n" * (LIMIT + 1))
    assert [line.split(":")[0] for line in too_long(folder)] == [
        "ipu_pipeline/errors.py",
        "kernels/op.cpp",
    ]
