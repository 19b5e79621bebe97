"""A model on meta: a rank holds its stage, trains as with the whole model, saves and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends.cluster.processes import Processes
from tests.tiny_models import TINY

TWO_BY_ONE = {"num_stages": 2, "microbatches": 8}
ONE_BY_TWO = {"num_stages": 1, "microbatches": 4, "replicas": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``save_pretrained`` writes of the model that the jobs build."""
    path = tmp_path_factory.mktemp("pretrained")
    TINY["gpt2-lm"].build(dropout=True)[0].save_pretrained(path, max_shard_size="20KB")
    return path


def test_it_trains_as_with_the_whole_model_and_resumes_elsewhere(
    two: Processes, folder: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "checkpoint")
    expected = two.run("saving_jobs.trained", planned=TWO_BY_ONE, steps=6)[0]
    found = two.run("saving_jobs.from_meta", planned=TWO_BY_ONE, weights=str(folder), path=path)
    assert all(one["losses"] == expected for one in found)
    whole = sum(p.nbytes for p in TINY["gpt2-lm"].build()[0].parameters())
    assert max(one["held"] for one in found) < 0.6 * whole
    early, state = found[0]["refused"]
    assert "is known after the first step or evaluation; run one before you save" in early
    assert "each process has the weights of its own stages only; save_checkpoint" in state
    again = two.run("saving_jobs.from_meta", planned=ONE_BY_TWO, load=path)
    assert all(one["losses"] == pytest.approx(expected[3:], rel=1e-5) for one in again)


def test_a_start_from_scratch_does_not_depend_on_the_split(two: Processes, tmp_path: Path) -> None:
    found = [
        two.run("saving_jobs.from_meta", planned=planned, path=str(tmp_path / str(n)))[0]
        for n, planned in enumerate((TWO_BY_ONE, ONE_BY_TWO))
    ]
    assert found[0]["losses"] == pytest.approx(found[1]["losses"], rel=1e-5)


def test_all_ranks_refuse_weights_that_one_cannot_read(two: Processes, tmp_path: Path) -> None:
    answers = two.answers(
        "saving_jobs.from_meta", planned=TWO_BY_ONE, weights=str(tmp_path / "nowhere")
    )
    assert not any(good for good, _ in answers)
    assert all("neither model.safetensors nor" in text for _, text in answers)
