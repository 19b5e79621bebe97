"""Optimizer state divided among replicas: the same training, a part of the state each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ipu_pipeline.planner.search import Constraints
from tests.backends.cluster import jobs
from tests.backends.cluster.processes import Processes, free_port
from tests.later import every_second

SHARDED = {"replicated_tensor_sharding": True}
TWO_BY_TWO = {"num_stages": 2, "replicas": 2}


def replicas_of(number: int, num_stages: int = 1) -> dict[str, int]:
    return {"num_stages": num_stages, "replicas": number, "microbatches": 2}


@pytest.fixture(scope="module")
def started(four: Processes) -> Iterator[dict[int, Processes]]:
    """Processes by how many they are, started when they are needed."""
    running = {4: four}
    yield running
    for number, processes in running.items():
        if number != 4:
            processes.close()


def run(started: dict[int, Processes], world_size: int, job: str, **arguments: Any) -> list[Any]:
    if world_size not in started:
        started[world_size] = Processes(world_size)
    return started[world_size].run(job, **arguments)


def local_curve(name: str, microbatches: int, steps: int, **options: Any) -> list[Any]:
    planned = {"dropout": True, "num_stages": 1, "microbatches": microbatches}
    made, batch = jobs.compiled(name, target="local", planned=planned, **options)
    with made:
        return [made.train_step(batch) for _ in range(steps)]


def num_trained(name: str) -> int:
    model, _ = jobs.TINY[name].build()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "stages", "replicas"),
    [
        pytest.param("bert-qa", 1, 2, marks=pytest.mark.acceptance),
        ("t5", 1, 3),
        pytest.param("bert-qa", 1, 4, marks=pytest.mark.acceptance),
        pytest.param("gpt2-lm", 2, 2, marks=pytest.mark.acceptance),
        pytest.param("gpt2-lm", 2, 3, marks=pytest.mark.acceptance),
    ],
)
def test_trains_as_one_process_does_with_a_share_of_the_state(
    started: dict[int, Processes], name: str, stages: int, replicas: int
) -> None:
    options = {"max_grad_norm": 0.5, "loss_scaling": 8.0}
    planned: dict[str, Any] = replicas_of(replicas, stages)
    if stages == 2:  # as many parameters in each stage, whatever a split is predicted to cost
        halves = {"transformer.h.1": 0, "transformer.h.2": 1}
        planned["constraints"] = Constraints(pinned_stages=halves)
    found = run(
        started,
        stages * replicas,
        "curve",
        name=name,
        planned=planned,
        steps=5,
        **options,
        **SHARDED,
    )
    expected = local_curve(name, 2 * replicas, 5, **options)
    for rank in found:
        assert rank["losses"] == pytest.approx([e.loss for e in expected], rel=1e-5)
        assert rank["norms"] == pytest.approx([e.grad_norm for e in expected], rel=1e-4)
        assert rank["norms"] == found[0]["norms"]
        assert rank["state"] == found[0]["state"]
    assert max(found[0]["norms"]) > 0.5  # clipping was on
    assert len({weights["transformer.wte.weight"] for weights in owned(found, name)}) <= 1
    moments = [rank["moments"] for rank in found]
    assert sum(moments) == 2 * num_trained(name)  # AdamW's two, each once in the whole job
    assert max(moments) <= 1.1 * sum(moments) / len(found)


def owned(found: list[Any], name: str) -> list[dict[str, str]]:
    """Return what every process has of the weights that it trains, where some are tied."""
    return [rank["own"] for rank in found] if name == "gpt2-lm" else []


def test_two_replicas_compute_the_bits_of_undivided_state(started: dict[int, Processes]) -> None:
    arguments: dict[str, Any] = {"name": "gpt2-lm", "planned": TWO_BY_TWO, "steps": 5}
    found = run(started, 4, "curve", **arguments, **SHARDED)
    whole = run(started, 4, "curve", **arguments)
    for divided, undivided in zip(found, whole, strict=True):
        assert divided["losses"] == undivided["losses"]
        assert divided["state"] == undivided["state"] == found[0]["state"]
        assert divided["own"] == undivided["own"]
        assert divided["moments"] < 0.6 * undivided["moments"]


@pytest.mark.parametrize("sharding", every_second([True, False]))
def test_tied_weights_of_16_bits_rounded_at_random_stay_equal(
    started: dict[int, Processes], *, sharding: bool
) -> None:
    found = run(
        started,
        4,
        "curve",
        name="gpt2-lm",
        planned={**TWO_BY_TWO, "dtype": torch.bfloat16},
        steps=5,
        optimizer_class=jobs.StochasticAdamW,
        replicated_tensor_sharding=sharding,
    )
    assert len({rank["own"]["transformer.wte.weight"] for rank in found}) == 1
    assert all(rank["state"] == found[0]["state"] for rank in found)


def test_every_rank_skips_a_step_that_overflowed(started: dict[int, Processes]) -> None:
    found = run(
        started,
        4,
        "curve",
        name="bert-qa",
        planned=TWO_BY_TWO,
        steps=2,
        loss_scaling=1e40,
        **SHARDED,
    )
    model, _, _ = jobs.built("bert-qa", **TWO_BY_TWO)
    for rank in found:
        assert rank["skipped"] == [True, True]
        assert rank["state"] == {n: jobs.digest(t) for n, t in model.state_dict().items()}


@pytest.mark.parametrize(
    "optimizer_class",
    [
        torch.optim.Adagrad,
        pytest.param(torch.optim.SGD, marks=pytest.mark.acceptance),
        pytest.param(torch.optim.AdamW, marks=pytest.mark.acceptance),
    ],
)
def test_more_replicas_than_parameters(started: dict[int, Processes], optimizer_class: Any) -> None:
    changed = {"optimizer_class": optimizer_class, "num_trained": 2}
    found = run(
        started,
        3,
        "curve",
        name="bert-qa",
        planned=replicas_of(3),
        steps=3,
        **changed,
        **SHARDED,
    )
    expected = local_curve("bert-qa", 6, 3, **changed)
    for rank in found:
        assert rank["losses"] == pytest.approx([e.loss for e in expected], rel=1e-5)
        assert rank["norms"] == pytest.approx([e.grad_norm for e in expected], rel=1e-4)
    assert [rank["moments"] == 0 for rank in found].count(True) >= 1


def test_gradients_are_whole_where_they_are_asked_for(started: dict[int, Processes]) -> None:
    found = run(started, 4, "two_sums", name="gpt2-lm", planned=TWO_BY_TWO, **SHARDED)
    whole = run(started, 4, "two_sums", name="gpt2-lm", planned=TWO_BY_TWO)
    assert found == whole
    assert all(rank["gradients"] and not rank["left"] for rank in found)


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.acceptance)])
def test_checkpoints_are_those_of_undivided_state(
    started: dict[int, Processes], tmp_path: Path, number: int
) -> None:
    """Of the first runs in a chain, each of which goes on from the one before."""
    paths = [str(tmp_path / str(index)) for index in range(4)]
    arguments: dict[str, Any] = {"name": "gpt2-lm"}
    one = {"num_stages": 1, "microbatches": 8}
    chain = [(TWO_BY_TWO, SHARDED), (one, {}), (replicas_of(4), SHARDED), (TWO_BY_TWO, {})]
    runs: list[list[Any]] = []
    for index, (planned, options) in enumerate(chain[:number]):
        given = {**arguments, **options, "planned": planned, "path": paths[index]}
        given["load"] = paths[index - 1] if index else ""
        if planned is one:
            runs.append([jobs.train_and_save(**given, target="local")])
        else:
            runs.append(run(started, 4, "train_and_save", **given))
    whole = local_curve("gpt2-lm", 8, 3 * number + 3)
    for index, ranks in enumerate(runs):
        expected = [step.loss for step in whole[3 * index : 3 * index + 6]]
        for rank in ranks:
            assert rank["before"] + rank["after"] == pytest.approx(expected, rel=1e-5)
            assert rank["extra"] == ({"epoch": 1} if index else {})
    first, local, *later = ([rank["num_states"] for rank in ranks] for ranks in runs)
    assert sum(first) == local[0]
    if later:
        again, undivided = later
        assert sum(again) == local[0]
        assert sum(undivided) > 2 * local[0]  # tied ones more than twice


def test_one_replica_has_nothing_to_divide(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for key, value in (values | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(key, value)
    made, batch = jobs.compiled("bert-qa", planned={"num_stages": 1}, **SHARDED)
    with made:
        made.train_step(batch)
        assert jobs.num_moments(made) == 2 * num_trained("bert-qa")
    assert "replicated_tensor_sharding changes nothing: the plan has 1 replica" in caplog.text
