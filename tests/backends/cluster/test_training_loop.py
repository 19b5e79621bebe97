"""The training loop over ranks: what to resume from, what to keep, and who writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ipu_pipeline.train.output_folder import LOCK, RUN
from tests.backends.cluster import saving_jobs
from tests.backends.cluster.processes import Processes
from tests.later import every_second


def test_a_replica_reads_its_share(two: Processes, tmp_path: Path) -> None:
    """The last batch of an epoch has 2 samples, which are all the first replica's."""
    options = {"num_samples": 26, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    found = two.run(
        "saving_jobs.loop", folder=str(tmp_path), batches="share", replicas=2, **options
    )
    options["gradient_accumulation_steps"] = 4
    expected = saving_jobs.loop(str(tmp_path / "one"), target="local", **options)
    for logs, loss, _ in found:
        assert logs == pytest.approx(expected[0], rel=1e-5)
        assert loss == pytest.approx(expected[1], rel=1e-5)
    # 8 batches are 6 of 8 samples and 2 of 2.
    assert [rank[2] for rank in found] == [6 * 4 + 2 * 2, 6 * 4]
    assert expected[2] == sum(rank[2] for rank in found)


@pytest.mark.parametrize("async_save", every_second([True, False]))
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    two: Processes, tmp_path: Path, async_save: bool
) -> None:
    expected = saving_jobs.loop(str(tmp_path / "local"), target="local")
    folder = tmp_path / "ranks"
    cut = two.run("saving_jobs.loop", folder=str(folder), stop_at=5, async_save=async_save)
    assert cut == [None, None]
    kept = ["checkpoint-2", "checkpoint-4"]
    assert sorted(p.name for p in folder.iterdir()) == [LOCK, *kept, RUN]
    found = two.run("saving_jobs.loop", folder=str(folder), async_save=async_save)
    assert found[0] == found[1]
    logs, loss, _ = found[0]
    assert logs == pytest.approx(expected[0], rel=1e-5)
    assert loss == pytest.approx(expected[1], rel=1e-5)
    checkpoints = [p for p in folder.glob("*") if p.is_dir()]
    assert sorted(p.name for p in checkpoints) == ["checkpoint-6", "checkpoint-8"]
    assert [path.name for path in folder.glob(".*")] == [LOCK]
    for path in checkpoints:
        state = json.loads((path / "trainer_state.json").read_text())
        assert path.name == f"checkpoint-{state['global_step']}"
