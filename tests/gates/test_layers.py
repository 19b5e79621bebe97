"""Imports point downwards, the core knows no torch, and Graphcore's SDK stays in its target."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tests.gates.planted import PACKAGE, copy_package, core_modules, plant, run

SDK = ("poptorch", "popart", "poplar")


def contracts(root: Path) -> list[dict]:
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    return settings["tool"]["importlinter"]["contracts"]


def lint_imports(folder: Path):
    return run(folder, "lint-imports", "--no-logo", "--no-cache")


def test_import_contracts_hold(root: Path) -> None:
    result = lint_imports(root)
    assert result.returncode == 0, result.stdout + result.stderr


FREE = "plans, their planning and their prices import neither torch nor transformers"
# By file: a line that a contract forbids, what is imported by it, and the contract.
PLANTED = {
    "planner/price.py": (
        "import ipu_pipeline.backends",
        "ipu_pipeline.backends",
        "layers point downwards",
    ),
    "ir/machine.py": ("import torch", "torch", FREE),
    "backends/ipu/config/presets.py": ("from transformers import AutoConfig", "transformers", FREE),
    "backends/local/backend.py": (
        "import ipu_pipeline.backends.cluster.backend",
        "ipu_pipeline.backends.cluster.backend",
        "a backend never imports another one",
    ),
    "train/__init__.py": ("import poptorch", "poptorch", "Graphcore's SDK stays in backends/ipu"),
}


def test_planted_imports_are_caught(root: Path, tmp_path: Path) -> None:
    folder = copy_package(root, tmp_path)
    for file, (code, _, _) in PLANTED.items():
        plant(folder, file, code)
    result = lint_imports(folder)
    said = " ".join(result.stdout.split())
    assert result.returncode != 0
    for file, (_, imported, broken) in PLANTED.items():
        importer = f"{PACKAGE}.{file.removesuffix('.py').removesuffix('/__init__')}"
        assert f"{broken} BROKEN" in said
        assert f"{importer.replace('/', '.')} -> {imported} (l." in said


def listed(root: Path, part_of_name: str) -> set[str]:
    return set(next(c for c in contracts(root) if part_of_name in c["name"])["source_modules"])


def test_contracts_list_every_module_that_exists(root: Path) -> None:
    """import-linter refuses modules that do not exist, so new ones have to be added by hand."""
    packages = {f"{PACKAGE}.{path.parent.name}" for path in (root / PACKAGE).glob("*/__init__.py")}
    assert listed(root, "neither torch") == set(core_modules(root))
    assert packages - {f"{PACKAGE}.{name}" for name in ("backends", "cli")} <= listed(
        root, "SDK stays"
    )


def sdk_imports(root: Path) -> list[str]:
    """Return the files outside backends/ipu that import Graphcore's SDK."""
    allowed = root / PACKAGE / "backends" / "ipu"
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        if allowed not in path.parents and imports_sdk(path):
            found.append(str(path.relative_to(root)))
    return found


def imports_sdk(path: Path) -> bool:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return any(name.split(".")[0] in SDK for name in names)


def test_sdk_is_imported_in_its_target_only(root: Path) -> None:
    assert sdk_imports(root) == []


def test_planted_sdk_import_is_caught(root: Path, tmp_path: Path) -> None:
    folder = copy_package(root, tmp_path)
    plant(folder, "stages/executable.py", "def f():\n    from poptorch import Options")
    assert sdk_imports(folder) == ["ipu_pipeline/stages/executable.py"]
