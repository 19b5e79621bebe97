"""Planning, simulating and reading a saved plan need no torch: importing the core loads none."""

from __future__ import annotations

from pathlib import Path

from tests.gates.planted import copy_package, core_modules, plant, run

HEAVY = ("torch", "transformers")
CHECK = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        importlib.import_module(found.name)
print(*(name for name in {heavy} if name in sys.modules))
"""


def loaded(folder: Path, *modules: str) -> str:
    """Import the modules with all below them; return which heavy libraries came along."""
    result = run(folder, "python", "-c", CHECK.format(heavy=HEAVY), *modules)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_core_and_command_line_load_no_torch(root: Path) -> None:
    assert loaded(root, *core_modules(root), "ipu_pipeline.cli") == ""


def test_planted_torch_import_is_caught(root: Path, tmp_path: Path) -> None:
    folder = copy_package(root, tmp_path)
    plant(folder, "ir/machine.py", "import torch")
    assert loaded(folder, "ipu_pipeline.ir") == "torch"
