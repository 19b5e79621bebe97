"""Outputs are refused before any work: the plans and models that are named here do not exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ipu_pipeline.cli import app
from tests.ir.plan_example import example_plan

FILES = {
    "plan": ("plan", "none", "-o"),
    "tune": ("tune", "none", "--global-batch", "8", "-o"),
    "tune, configuration": ("tune", "none", "--global-batch", "8", "--ipu-config-output"),
    "simulate": ("simulate", "none", "--trace"),
    "report": ("report", "none", "-o"),
    "launch": ("launch", "none", "--slurm"),
}
FOLDERS = {"emit": ("emit", "none", "-o"), "launch": ("launch", "none", "--log-dir")}
AFTER = {"launch": ("--", "a.py")}


def said(*command: str) -> str:
    """Return the one line that a command refuses with."""
    result = CliRunner().invoke(app, [*command, *AFTER.get(command[0], ())])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_written_is_refused_first(tmp_path: Path, name: str) -> None:
    command = FILES[name]
    (tmp_path / "file").write_text("old")
    option = {"-o": "--output"}.get(command[-1], command[-1])
    for bad, why in {
        tmp_path: "it is a folder",
        tmp_path / "file": "it exists; choose another path, or replace it with --force",
        tmp_path / "none" / "a": "there is no such folder; make it first",
        tmp_path / "file" / "a": "a part of the path is a file",
        tmp_path / ("x" * 300): "choose a shorter one",
        Path("/proc/a"): "/proc/a",
    }.items():
        text = said(*command, str(bad))
        assert text.startswith(f"error: {option} ")
        assert why in text
    assert "none" in said(*command, str(tmp_path / "file"), "--force"), "the next thing is refused"
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_may_not_be_written_is_refused_first(tmp_path: Path, name: str) -> None:
    command = FOLDERS[name]
    (tmp_path / "file").write_text("old")
    for bad, why in {
        tmp_path / "file": "it is a file; give a folder",
        tmp_path / "file" / "a": "a part of the path is a file",
        tmp_path / ("x" * 300): "choose a shorter one",
        Path("/proc/a"): "/proc/a",
    }.items():
        assert why in said(*command, str(bad))


def test_a_bundle_replaces_nothing_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    assert "it is not empty; choose another" in said("emit", "none", "-o", str(tmp_path))
    assert "cannot read the plan none" in said("emit", "none", "-o", str(tmp_path), "--force")


def test_a_path_that_is_no_text_is_no_error(tmp_path: Path) -> None:
    example_plan().save(tmp_path / "plan.json")
    command = [sys.executable, "-m", "ipu_pipeline", "simulate", str(tmp_path / "plan.json")]
    command += ["--trace", f"{tmp_path}/\udcff"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"\\udcff\n")
    assert len(list(tmp_path.iterdir())) == 2
