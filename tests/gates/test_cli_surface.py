"""The command line changes on purpose only: every help page is pinned in tests/golden/."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ipu_pipeline.cli import app

RUNNER = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})


def help_pages(application: typer.Typer) -> str:
    """Return the help of the program and of every command."""
    names = sorted(typer.main.get_command(application).commands)
    pages = []
    for command in ([], *([name] for name in names)):
        result = RUNNER.invoke(application, [*command, "--help"], prog_name="ipu-pipeline")
        assert result.exit_code == 0, result.output
        pages.append(f"$ ipu-pipeline {' '.join([*command, '--help'])}\n{result.output.strip()}\n")
    return "\n".join(pages)


def test_help_is_pinned(golden) -> None:
    golden("cli_help.txt", help_pages(app))


def test_planted_option_is_caught(golden, request) -> None:
    if request.config.getoption("--update-golden"):
        pytest.skip("would write the planted command")
    changed = typer.Typer(add_completion=False, rich_markup_mode=None)
    changed.command("plan")(lambda extra=1: None)
    changed.command("other")(lambda: None)
    with pytest.raises(AssertionError, match=r"cli_help\.txt changed"):
        golden("cli_help.txt", help_pages(changed))


def test_docs_name_every_command(root: Path) -> None:
    text = "".join(path.read_text() for path in (root / "docs").rglob("*.md"))
    for name in typer.main.get_command(app).commands:
        assert f"ipu-pipeline {name}" in text, f"no page mentions ipu-pipeline {name}"
