"""The command, on classes that a stand-in checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tools.coverage import session
from tools.coverage.command import app
from tools.coverage.record import Record
from tools.coverage.run import Journal


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the classes that were checked; every second one fails."""
    names: list[str] = []

    def run(items, *, done, **_):
        for item in items:
            names.append(item.name)
            result = "differs" if len(names) % 2 == 0 else "pass"
            done(Record(item.name, item.architecture, item.task, result, "because"))

    monkeypatch.setattr(session, "run", run)
    return names


def test_records_are_written_and_failures_printed(checked: list[str], tmp_path: Path) -> None:
    output = tmp_path / "coverage.json"
    options = ["--classes", "ctc", "--sample", "4", "--output", str(output)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert len(checked) == 4
    assert f"{checked[1]}: differs: because" in result.output
    assert "2 of 4 counted classes pass, of 2 architectures (2 differs, 2 pass)" in result.output
    assert output.exists()
    assert "## Every class" in output.with_suffix(".md").read_text()
    assert not output.with_suffix(".jsonl").exists()


def test_resume_checks_only_what_is_left(checked: list[str], tmp_path: Path) -> None:
    output = tmp_path / "coverage.json"
    options = ["--classes", "Wav2Vec2For*", "--output", str(output)]
    assert CliRunner().invoke(app, options).exit_code == 0
    done = checked.copy()
    versions = session.installed_versions()
    known = [Record(name, "wav2vec2", "ctc", "pass") for name in done[:-1]]
    header = {"versions": versions, "check": None}
    Journal(output.with_suffix(".jsonl"), header, known)
    checked.clear()
    result = CliRunner().invoke(app, [*options, "--resume"])
    assert result.exit_code == 0, result.output
    assert checked == done[-1:]


def test_what_is_known_is_written_before_the_end(checked: list[str], tmp_path: Path) -> None:
    """In the order of the classes, whatever order they were checked in; then it goes on."""
    output = tmp_path / "coverage.json"
    options = ["--classes", "ctc", "--resume", "--output", str(output)]
    assert CliRunner().invoke(app, [*options, "--at-most", "3"]).exit_code == 0
    first = checked.copy()
    assert len(first) == 3
    names = [item["name"] for item in json.loads(output.read_text())["records"]]
    assert names == sorted(first)
    assert CliRunner().invoke(app, options).exit_code == 0
    assert len(set(checked)) == len(checked) > 3
    assert not output.with_suffix(".jsonl").exists()


@pytest.mark.parametrize("name", ["coverage.jsonl", "coverage.md"])
def test_a_name_that_the_journal_or_the_page_would_take_is_refused(
    checked: list[str], tmp_path: Path, name: str
) -> None:
    result = CliRunner().invoke(app, ["--classes", "ctc", "--output", str(tmp_path / name)])
    assert result.exit_code == 1
    kind = "page" if name.endswith("md") else "journal"
    assert f"its {kind} {tmp_path / name}: --output names the same file" in result.output
    assert not checked


def test_an_unknown_pattern_is_one_line() -> None:
    result = CliRunner().invoke(app, ["--classes", "Nothing*"])
    assert result.exit_code == 1
    assert "error: none of" in result.output
