"""One checkpoint of many ranks: it loads anywhere, and no failure loses an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from ipu_pipeline.checkpoint import is_complete
from ipu_pipeline.stages.materialize import materialize
from tests.backends.cluster import jobs, saving_jobs
from tests.backends.cluster.processes import Processes
from tests.later import every_second, in_turn, now
from tests.tiny_models import TINY

TWO = {"num_stages": 2}
FOUR_BY_ONE = {"num_stages": 4, "microbatches": 8}
TWO_BY_TWO = {"num_stages": 2, "microbatches": 4, "replicas": 2}


@pytest.fixture(scope="module")
def saved(four: Processes, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float]]:
    """A checkpoint of 4 stages after 3 steps, and the losses of the 3 steps that followed."""
    path = str(tmp_path_factory.mktemp("saved") / "checkpoint")
    found = four.run("saving_jobs.trained", planned=FOUR_BY_ONE, path=path)
    return path, found[0][3:]


def tensors(path: str | Path, stem: str) -> dict[str, torch.Tensor]:
    return {n: t for f in Path(path).glob(f"{stem}*.safetensors") for n, t in load_file(f).items()}


# ---------------------------------------------------------------- one logical checkpoint


def test_every_rank_writes_what_it_owns_once(saved: tuple[str, list[float]]) -> None:
    path, _ = saved
    model, _, _ = jobs.built("gpt2-lm", **FOUR_BY_ONE)
    names = [name for name, _ in model.named_parameters()]
    parts = [load_file(f) for f in sorted(Path(path).glob("model-0000?-of-00004.safetensors"))]
    assert len(parts) == 4
    assert sorted(name for part in parts for name in part) == sorted(names)
    state = [load_file(f) for f in sorted(Path(path).glob("optimizer-0000?-of-00004.safetensors"))]
    assert sum(len(part) for part in state) == 3 * len(names)
    assert all("exp_avg/" + n in s for part, s in zip(parts, state, strict=True) for n in part)


def test_it_continues_at_two_by_two(four: Processes, saved: tuple[str, list[float]]) -> None:
    path, expected = saved
    found = four.run("saving_jobs.trained", planned=TWO_BY_TWO, load=path)
    assert all(losses == pytest.approx(expected, rel=1e-5) for losses in found)


@pytest.mark.acceptance
def test_it_continues_in_one_process(saved: tuple[str, list[float]]) -> None:
    path, expected = saved
    one = Processes(1)
    planned = {"num_stages": 1, "microbatches": 8}
    found = one.run("saving_jobs.trained", planned=planned, load=path)
    one.close()
    assert found[0] == pytest.approx(expected, rel=1e-5)


def test_it_continues_on_the_local_target(saved: tuple[str, list[float]]) -> None:
    path, expected = saved
    planned = {"num_stages": 3, "microbatches": 8, "dropout": True}
    made, batch = jobs.compiled("gpt2-lm", planned=planned, target="local")
    with made:
        assert made.load_checkpoint(path) == {"epoch": 1}
        assert [made.train_step(batch).loss for _ in expected] == pytest.approx(expected, rel=1e-5)


def test_it_continues_from_pretrained(saved: tuple[str, list[float]]) -> None:
    path, expected = saved
    planned = {"num_stages": 3, "microbatches": 8, "dropout": True}
    made, batch = jobs.compiled("gpt2-lm", planned=planned, target="local")
    loaded, info = GPT2LMHeadModel.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    with made:
        made.load_checkpoint(path)
        torch.testing.assert_close(loaded.state_dict(), made.model.state_dict(), rtol=0, atol=0)
    again, _ = jobs.compiled("gpt2-lm", planned=planned, target="local")
    again.model.load_state_dict(loaded.state_dict())
    again.global_step = 3
    assert again.forward_backward(batch) == pytest.approx(expected[0], rel=1e-6)
    again.close()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_checkpoint_reads_it(
    saved: tuple[str, list[float]], tmp_path: Path
) -> None:
    path, _ = saved
    expected = tensors(path, "model") | tensors(path, "optimizer")
    found: dict[str, Any] = {name: torch.zeros_like(t) for name, t in expected.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # And back: what it writes is read by a model without weights.
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path))
    dcp.save({n: found[n] for n in tensors(path, "model")}, storage_writer=writer, no_dist=True)
    model, _ = TINY["gpt2-lm"].build(device="meta")
    materialize(model, tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(path)
    torch.testing.assert_close(model.state_dict(), loaded.state_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------- in the background


@pytest.mark.parametrize("planned", every_second([TWO, {"num_stages": 1, "replicas": 2}]))
def test_in_the_background_the_same_bytes_are_written(
    two: Processes, tmp_path: Path, planned: dict[str, int]
) -> None:
    found = two.run("saving_jobs.saved_twice", folder=str(tmp_path), planned=planned)
    now, later = (saving_jobs.files(str(tmp_path / name)) for name in ("now", "later"))
    assert now == later
    for rank in found:
        assert rank["hidden"]
        assert rank["complete"]
        assert rank["losses"][0] == rank["losses"][1]


@pytest.mark.parametrize(("rank", "blocking"), in_turn([0, 1], [True, False]))
def test_a_full_disk_of_one_rank_is_reported_by_all(
    two: Processes, tmp_path: Path, rank: int, blocking: bool
) -> None:
    found = two.run(
        "saving_jobs.failing_saves",
        folder=str(tmp_path),
        planned=TWO,
        rank=rank,
        blocking=blocking,
    )
    # In the background the error is raised by the save that follows.
    error = 0 if blocking else 1
    assert "could not write" in found[rank]["errors"][error]
    assert f"rank {rank}: could not write" in found[1 - rank]["errors"][error]
    for answer in found:
        assert answer["errors"][:error] == [""] * error
        assert answer["left"] == (["first", "third"] if blocking else ["first"])
    assert is_complete(tmp_path / "first")
    assert is_complete(tmp_path / "third")


@pytest.mark.parametrize("how", ["wait", "load", "close", "own error"])
def test_an_error_of_the_last_save_is_raised_by_what_follows(
    two: Processes, tmp_path: Path, how: str
) -> None:
    found = two.run("saving_jobs.error_at_the_end", folder=str(tmp_path), planned=TWO, how=how)
    message = "KeyError: 'mine'" if how == "own error" else "OSError: rank 1: could not write"
    assert found[0].startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "where",
    now(["finish"], ["write_shard", "finish", "background"]),
)
def test_a_rank_that_is_killed_leaves_the_earlier_checkpoint(tmp_path: Path, where: str) -> None:
    processes = Processes(2, joined=False)
    answers = processes.answers(
        "saving_jobs.killed", folder=str(tmp_path), planned=TWO, where=where
    )
    processes.close()
    survivor = 1 if where == "finish" else 0
    assert [good for good, _ in answers] == [rank == survivor for rank in range(2)]
    # Rank 0 takes the store with it, perhaps before rank 1 has read its first sign of life.
    messages = [f"rank {1 - survivor} showed no sign of life", "process that holds it (rank 0"]
    assert any(message in answers[survivor][1] for message in messages[: 1 + survivor])
    assert not (tmp_path / "second").exists()
    with jobs.compiled("gpt2-lm", planned=TWO, target="local")[0] as made:
        made.load_checkpoint(tmp_path / "first")
        assert made.global_step == 1
        made.save_checkpoint(tmp_path / "third")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "third"]


# ---------------------------------------------------------------- no shared disk


def test_without_a_shared_disk_the_first_rank_gathers_everything(
    two: Processes, tmp_path: Path
) -> None:
    found = two.run("saving_jobs.without_shared_disk", folder=str(tmp_path), planned=TWO)
    for lines in found:
        assert len(lines) == 1
        assert lines[0].startswith("ranks [1] do not see the folder of rank 0")
    for name in ("alone", "again"):
        assert (tmp_path / name / "model.safetensors").is_file()
        for stem in ("model", "optimizer"):
            expected = tensors(tmp_path / "shared", stem)
            torch.testing.assert_close(tensors(tmp_path / name, stem), expected, rtol=0, atol=0)
