"""The folder can be copied: Python 3.8 syntax, torch as the only import, no ipu_pipeline."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ipu_pipeline_emulator as standin

FOLDER = Path(standin.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))
NEWER = {"removeprefix", "removesuffix", "pairwise", "bit_count"}
STANDARD = [
    "__future__",
    "abc",
    "collections",
    "contextlib",
    "copy",
    "copyreg",
    "dataclasses",
    "enum",
    "functools",
    "importlib",
    "inspect",
    "itertools",
    "json",
    "logging",
    "os",
    "pathlib",
    "pickle",
    "sys",
    "time",
    "types",
    "typing",
]


def imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_syntax_and_imports(path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    assert imported(tree) <= {*STANDARD, "torch"}
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not used & NEWER
    first = tree.body[1] if path.stem not in ("__init__",) else None
    if first is not None and path.stem != "version":
        assert isinstance(first, ast.ImportFrom)
        assert first.module == "__future__", "annotations must not be evaluated"


def test_file_sizes() -> None:
    assert {path.name for path in FILES if len(path.read_text().splitlines()) >= 400} == set()


def test_a_copy_works_without_ipu_pipeline(tmp_path) -> None:
    shutil.copytree(FOLDER, tmp_path / "emulation", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys, emulation, torch\n"
        "with emulation.install() as poptorch:\n"
        "    print(poptorch.inferenceModel(torch.nn.Identity())(torch.ones(1)).item())\n"
        "print('ipu_pipeline' in sys.modules)\n"
    )
    # An own environment: PYTHONPATH of the tests would make ipu_pipeline importable.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["1.0", "False"], done.stderr
