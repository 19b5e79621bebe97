"""The workloads file is valid, and what is not is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.suite.workloads import FILE, WorkloadError, load


@pytest.fixture
def changed(tmp_path: Path):
    """Load the committed file after a change."""

    def _changed(change) -> Any:
        given = yaml.safe_load(FILE.read_text(encoding="utf-8"))
        change(given)
        path = tmp_path / "workloads.yaml"
        path.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
        return load(path)

    return _changed


def test_the_committed_file_is_valid() -> None:
    suite = load()
    main = suite.workloads["bert-base-qa"]
    assert (main.sequence, main.micro_batch, main.microbatches) == (384, 2, 16)
    assert list(main.precisions) == ["float32", "bf16"]
    assert all(each.contestants[0] == "eager" for each in suite.workloads.values())
    names = [*main.contestants, *suite.workloads["bert-small-qa"].contestants]
    kinds = {suite.contestants[name].kind for name in names}
    assert kinds == {"eager", "compiled", "local", "distributed", "ddp", "raw"}


def test_quick_leaves_out_what_compiles() -> None:
    suite = load()
    names = suite.workloads["bert-small-qa"].contestants
    assert set(names) - set(suite.wanted(names, quick=True)) == {"torch.compile"}
    assert suite.wanted(names, quick=False) == list(names)


@pytest.mark.parametrize("part", ["workloads", "memory", "planning", "solver"])
def test_every_part_has_something_quick(part) -> None:
    found = getattr(load(), part)
    entries = list(found.values() if isinstance(found, dict) else found)
    assert 0 < sum(entry.quick for entry in entries) < len(entries)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("colour", 1, "workloads: bert-base-qa: unknown field 'colour'; fields: model"),
        ("precisions", ["fp8"], "unknown precision 'fp8'; use one of float32; bf16"),
        ("precisions", [], "no precision is listed; use some of float32; bf16"),
        ("contestants", ["jax"], "unknown contestant 'jax'; use one of eager; torch.compile"),
        ("rounds", 0, "workloads: bert-base-qa, rounds: Expected `int` >= 1, the value is 0"),
        ("check_microbatches", 17, "check_microbatches is 17; use 1 to 16, the microbatches"),
    ],
)
def test_workloads_are_checked(changed, name, value, message) -> None:
    def change(given) -> None:
        given["workloads"]["bert-base-qa"][name] = value

    with pytest.raises(WorkloadError, match=message.replace(".", r"\.")):
        changed(change)


def test_what_is_missing_is_named(changed) -> None:
    with pytest.raises(WorkloadError, match="planning: llama 8B: missing field 'stages', 'rounds'"):
        changed(lambda given: [given["planning"]["llama 8B"].pop(n) for n in ("stages", "rounds")])


def test_kinds_and_workloads_are_known(changed) -> None:
    with pytest.raises(
        WorkloadError, match="contestants: DDP, kind: Expected one of eager, compiled"
    ):
        changed(lambda given: given["contestants"]["DDP"].update(kind="fsdp"))
    with pytest.raises(WorkloadError, match="unknown workload 'x'; use one of bert-base-qa"):
        changed(lambda given: given["memory"][0].update(workload="x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "no YAML of plain values: it has the key 'a' twice in one place"),
        ("a: .nan\n", "it holds the number NaN, which is not finite or beyond 64 bits"),
        ("a: 2026-01-01\n", "Object of type date is not JSON serializable; correct it"),
        ("a: &a [*a]\n", "more than 100000 values or 100 levels"),
        ('a: "\\ud800"\n', "half of a character; write it whole"),
        ("a: 99999999999999999999\n", "which is not finite or beyond 64 bits"),
        ("[" * 3000, "cannot read the workloads"),
        ("- 1\n", "Expected `object`, got `array`"),
        ("a: 1\n", "missing field 'contestants'"),
        ("", "Expected `object`, got `null`"),
    ],
)
def test_yaml_that_has_no_one_meaning_is_refused(tmp_path, text, message) -> None:
    (tmp_path / "workloads.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(WorkloadError, match=rf"workloads\.yaml.*{message}|{message}"):
        load(tmp_path / "workloads.yaml")
