"""One name for one thing: no public class name occurs twice in the package."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from tests.gates.planted import PACKAGE, copy_package, plant

# Copied into bundles as it is, without the package.
APART = ("backends/ipu/runtime/",)


def twice(root: Path) -> dict[str, list[str]]:
    """Return every public class name that several files define, with the files."""
    found = defaultdict(list)
    for path in sorted((root / PACKAGE).rglob("*.py")):
        place = path.relative_to(root / PACKAGE).as_posix()
        if place.startswith(APART):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(place)
    return {name: places for name, places in found.items() if len(places) > 1}


def test_no_public_class_name_occurs_twice(root: Path) -> None:
    assert twice(root) == {}


def test_a_planted_second_class_is_caught(root: Path, tmp_path: Path) -> None:
    folder = copy_package(root, tmp_path)
    plant(folder, "ir/text.py", "class Machine:\n    pass")
    assert twice(folder)["Machine"] == ["ir/machine.py", "ir/text.py"]
