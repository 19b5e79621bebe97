"""Checkpoints, evaluation, overflow, serialization: the rest of an executable's life."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ipu_pipeline.ops import extension
from tests.backends.cluster import jobs
from tests.backends.cluster.processes import Processes
from tests.backends.cluster.test_training import assert_equal
from tests.later import every_second

TWO = {"num_stages": 2}
FOUR = {"num_stages": 4}


def test_checkpoints_are_those_of_the_local_target(two: Processes, tmp_path: Path) -> None:
    # GPT-2: tied over the two ranks.
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    saved = two.run("train_and_save", name="gpt2-lm", planned=TWO, path=first)
    local = jobs.train_and_save("gpt2-lm", {"num_stages": 3}, second, load=first, target="local")
    again = two.run(
        "train_and_save",
        name="gpt2-lm",
        planned=FOUR,
        path=third,
        load=second,
        schedule="interleaved",
    )
    whole = jobs.train_and_save("gpt2-lm", {"num_stages": 1}, str(tmp_path / "x"), target="local")
    assert local["extra"] == {"epoch": 1}
    assert again[0]["extra"] == {"epoch": 1}
    assert saved[0]["before"] == pytest.approx(whole["before"], rel=1e-5)
    assert saved[0]["after"] == pytest.approx(whole["after"], rel=1e-5)
    assert local["before"] == pytest.approx(saved[0]["after"], rel=1e-5)
    assert again[0]["before"] == pytest.approx(local["after"], rel=1e-5)
    num_parameters = local["num_states"]
    assert all(0 < rank["num_states"] < num_parameters for rank in (*saved, *again))


@pytest.mark.skipif(not extension.state().usable, reason=extension.state().detail)
def test_casts_of_weights_last_for_a_step(two: Processes) -> None:
    local = jobs.casts_kept("bert-qa", TWO, target="local")
    for made, left in (local, *two.run("casts_kept", name="bert-qa", planned=TWO)):
        assert made > 0
        assert left == 0


def test_a_full_disk_is_reported_by_every_rank(two: Processes, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    found = two.run("save_into_a_file", planned=TWO, path=str(tmp_path / "file" / "checkpoint"))
    assert "File exists" in found[0]
    assert "rank 0: " in found[1]
    assert "File exists" in found[1]


@pytest.mark.parametrize(
    ("name", "planned", "schedule"),
    [
        ("bert-qa", TWO, "1f1b"),
        pytest.param("lxmert-qa", FOUR, "zbv", marks=pytest.mark.acceptance),
        pytest.param("t5", FOUR, "interleaved", marks=pytest.mark.acceptance),
    ],
)
@pytest.mark.parametrize("samples", every_second([5, 8]))
def test_evaluation(
    two: Processes, name: str, planned: dict[str, int], schedule: str, samples: int
) -> None:
    for rank in two.run(
        "evaluation", name=name, planned=planned, samples=samples, schedule=schedule
    ):
        assert rank["loss"] is not None
        assert rank["errors"]
        assert max(rank["errors"].values()) < 1e-5
        assert rank["loss"] == pytest.approx(rank["expected_loss"], rel=1e-6)


def test_every_rank_skips_a_step_that_overflowed(two: Processes) -> None:
    found = two.run("curve", name="bert-qa", planned=TWO, steps=2, loss_scaling=1e40)
    for rank in found:
        assert rank["skipped"] == [True, True]
        assert rank["losses"] == found[0]["losses"]
    model, _, _ = jobs.built("bert-qa", **TWO)
    assert found[0]["state"] == {n: jobs.digest(t) for n, t in model.state_dict().items()}


@pytest.mark.parametrize(
    ("planned", "schedule"), every_second([(FOUR, "interleaved_zero_bubble"), (TWO, "1f1b")])
)
def test_serialized_blocks(two: Processes, planned: dict[str, int], schedule: str) -> None:
    passes = (
        "serialize_embedding{factor=3,blocks=[transformer.wte]},"
        "serialize_projection{factor=3,blocks=[lm_head]}"
    )
    found = two.run(
        "gradients", name="gpt2-lm", planned={**planned, "passes": passes}, schedule=schedule
    )
    assert_equal(found)


@pytest.mark.parametrize("schedule", every_second(["zbv", "interleaved_zero_bubble"]))
def test_recomputed_blocks_where_the_backward_pass_is_split(two: Processes, schedule: str) -> None:
    planned = {**FOUR, "dropout": True}
    found = [
        two.run(
            "curve", name="bert-qa", planned=planned, steps=2, schedule=schedule, recompute=wish
        )[0]["losses"]
        for wish in ("all", "none")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_bf16(two: Processes) -> None:
    found = two.run("curve", name="bert-qa", planned=TWO, steps=3, precision="bf16")
    made, batch = jobs.compiled(
        "bert-qa", target="local", planned={"dropout": True, **TWO}, precision="bf16"
    )
    with made:
        expected = [made.train_step(batch).loss for _ in range(3)]
    assert found[0]["losses"] == pytest.approx(expected, rel=1e-2)
    assert torch.isfinite(torch.tensor(found[0]["losses"])).all()
