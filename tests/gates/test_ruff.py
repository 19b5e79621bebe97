"""The linter's rules hold, and it is really switched on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gates.planted import copy_package, plant, run

PLANTED = {
    "D103": "def added():\n    return None",
    "ANN201": 'def added():\n    """Do."""\n    return 1',
    "TID252": "from . import config",
    "ERA001": "# value = compute(1)",
    "F401": "import json",
}


def ruff(folder: Path):
    return run(folder, "ruff", "check", "--no-cache", "--output-format=concise", ".")


def test_sources_follow_the_rules(root: Path) -> None:
    result = ruff(root)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("rule", PLANTED)
def test_planted_fault_is_caught(root: Path, tmp_path: Path, rule: str) -> None:
    folder = copy_package(root, tmp_path)
    plant(folder, "errors.py", PLANTED[rule])
    result = ruff(folder)
    assert result.returncode != 0
    assert f"{rule} " in result.stdout
