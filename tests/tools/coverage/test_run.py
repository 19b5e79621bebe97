"""Processes with limits, and what a run remembers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ipu_pipeline.errors import DatasetError
from tests.backends.cluster.processes import forked
from tests.tools.coverage.fates import fate
from tools.coverage.classes import ModelClass
from tools.coverage.record import Record
from tools.coverage.run import Journal, remembered, run


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """Started here, so that what processes import does not depend on the tests before these."""
    forked(os.getpid).join()


def named(*names: str) -> list[ModelClass]:
    return [ModelClass(name, "toy", "causal-lm") for name in names]


def test_what_happens_to_a_process_happens_to_its_class_only() -> None:
    items = named("First", "Dies", "EagerDies", "Second")
    heard: list[str] = []
    found = run(items, jobs=2, check=fate, done=lambda record: heard.append(record.name))
    assert [record.name for record in found] == [item.name for item in items]
    assert sorted(heard) == sorted(record.name for record in found)
    assert [record.result for record in found] == ["pass", "crash", "eager-fails", "pass"]
    assert found[1].reason == "exit code 7"
    assert found[2].reason == "the model alone: crash, exit code 7"
    assert found[0].reason != found[3].reason  # a process each


def test_a_slow_class_is_stopped() -> None:
    hung, eager = run(named("Hangs", "EagerHangs"), jobs=2, check=fate, time_limit_s=4.0)
    assert (hung.result, hung.reason) == ("timeout", "longer than 4 s")
    assert (eager.result, eager.reason) == (
        "eager-fails",
        "the model alone: timeout, longer than 4 s",
    )
    assert hung.seconds >= 4.0


def test_memory_is_limited() -> None:
    (found,) = run(named("Starves"), check=fate)
    assert (found.result, found.reason) == ("step-fails", "no memory")


def test_an_interrupted_run_is_remembered(tmp_path: Path) -> None:
    path, header = tmp_path / "deep" / "run.jsonl", {"versions": {"torch": "1"}}
    first = Record("A", "a", "ctc", "pass", "", 7, (2, 4), 1e-8, ("input_values",), 1.5)
    journal = Journal(path, header)
    journal.add(first)
    with path.open("a") as file:
        file.write('{"name": "cut sho')  # the machine went down here
    assert remembered(path, header) == [first]
    Journal(path, header, [first]).add(Record("B", "b", "ctc", "timeout"))
    assert [record.name for record in remembered(path, header)] == ["A", "B"]


@pytest.mark.parametrize("line", ["{}", "[1", '{"name": 3}'])
def test_a_damaged_journal_is_not_resumed(tmp_path: Path, line: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(f'{{"versions": {{}}}}\n{line}\n')
    with pytest.raises(DatasetError, match=r"run\.jsonl cannot be resumed .*delete it, or leave"):
        remembered(path, {"versions": {}})


@pytest.mark.parametrize("text", ["", '{"versions": {"torch": "2"}}\n'])
def test_other_versions_remember_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.jsonl"
    assert remembered(path, {}) == []
    path.write_text(text)
    assert remembered(path, {"versions": {"torch": "1"}}) == []
