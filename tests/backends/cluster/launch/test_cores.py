from __future__ import annotations

import os
from pathlib import Path

import pytest

from ipu_pipeline.backends.cluster.launch.cores import threads_per_process, usable_cores


@pytest.fixture
def cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four processors, two of which are threads of one core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    for processor, siblings in enumerate(("0,2", "1", "0,2", "3")):
        folder = tmp_path / f"cpu{processor}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    return tmp_path


def test_threads_of_one_core_count_once(cpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = cpus / "none"
    assert usable_cores(cpus, none) == 3
    assert usable_cores(none, none) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    assert usable_cores(cpus, none) == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert usable_cores(cpus, none) == 2


@pytest.mark.parametrize(
    ("limit", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 3), ("?", 3)]
)
def test_a_containers_limit_counts(cpus: Path, limit: str, cores: int) -> None:
    quota = cpus / "cpu.max"
    quota.write_text(f"{limit}\n")
    assert usable_cores(cpus, quota) == cores


def test_cores_are_shared_evenly() -> None:
    assert [threads_per_process(n, 8) for n in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]
