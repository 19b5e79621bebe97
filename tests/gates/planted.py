"""A copy of the package in which a test plants a fault, and the gates as commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = "ipu_pipeline"
CORE = (
    "errors",
    "ir",
    "planner",
    "backends.ipu.config",
    "backends.ipu.prices",
    "cli.report",
)


def copy_package(root: Path, to: Path) -> Path:
    """Copy the package and its settings; return the folder that holds both."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / PACKAGE, to / PACKAGE, ignore=ignored)
    shutil.copy(root / "pyproject.toml", to)
    return to


def plant(folder: Path, file: str, code: str) -> None:
    """Append ``code`` to a file of the package copy."""
    path = folder / PACKAGE / file
    path.write_text(f"{path.read_text()}\n{code}\n")


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of this environment in ``folder`` and return what it said."""
    tool, *arguments = command
    found = Path(sys.executable).parent / tool
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [str(found), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def core_modules(root: Path) -> list[str]:
    """Return the modules of the core that exist."""
    package = root / PACKAGE
    return [
        f"{PACKAGE}.{name}"
        for name in CORE
        if (package / f"{name.replace('.', '/')}.py").exists()
        or (package / name.replace(".", "/") / "__init__.py").exists()
    ]
