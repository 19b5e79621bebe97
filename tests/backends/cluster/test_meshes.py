"""Meshes of replicas, positions and slices compute what one process does, whatever the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.backends.cluster import slice_jobs
from tests.backends.cluster.matrix import SCHEDULES, case, difference, tied
from tests.backends.cluster.processes import Processes
from tests.versions import needs_styles

# (dp, pp, tp) of one batch of 4 microbatches.
MESHES: dict[tuple[int, int, int], dict[str, Any]] = {
    (1, 2, 2): {"num_stages": 2, "tp": 2},
    (2, 1, 2): {"num_stages": 1, "tp": 2, "replicas": 2, "microbatches": 2},
    (2, 2, 1): {"num_stages": 2, "replicas": 2, "microbatches": 2},
    (4, 1, 1): {"num_stages": 1, "replicas": 4, "microbatches": 1},
    (1, 1, 4): {"num_stages": 1, "tp": 4},
    (1, 4, 1): {"num_stages": 4},
}
# Those with a plan of tensor parallelism; and those that drop out where it cannot.
CUT = ("llama-tied", "mixtral-wide", "starcoder2-dropout")
WHOLE = ("bert-qa", "gpt2-lm", "t5", "llama-dropout", "mixtral-dropout")
STEPS, STEPS_AFTER = 50, 3
NAMES = [*(pytest.param(name, marks=needs_styles) for name in CUT), *WHOLE]


def meshes_of(name: str) -> list[tuple[int, int, int]]:
    """Return the meshes on which a model runs; four slices only where it has as many heads."""
    most = 1 if name in WHOLE else 4 if name == "mixtral-wide" else 2
    return [mesh for mesh in MESHES if mesh[2] <= most]


def local(name: str, steps: int) -> list[float]:
    planned = {"num_stages": 1, "dropout": name in WHOLE}
    losses: list[float] = slice_jobs.trained(
        name=name, planned=planned, steps=steps, target="local"
    )["losses"]
    return losses


def check_gradients(found: list[dict[str, Any]]) -> None:
    assert set().union(*(rank["found"] for rank in found)) == found[0]["expected"]
    for rank in found:
        assert rank["loss"] == pytest.approx(rank["expected_loss"], rel=1e-6)
        assert rank["error"] < 1e-6
        assert rank["own_error"] < 1e-3


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [n for n in NAMES if "dropout" not in str(n)])
def test_gradients_under_every_schedule(four: Processes, name: str) -> None:
    for mesh in meshes_of(name):
        dp, pp, tp = mesh
        for schedule in SCHEDULES if pp > 1 else ("1f1b",):
            given = case(schedule, pp)
            given["planned"] |= {"replicas": dp, "tp": tp}
            found = four.run("slice_jobs.gradients", name=name, **given)
            print(f"{name} {mesh} {schedule}: {max(rank['error'] for rank in found):.1e}")
            check_gradients(found)


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_checkpoints(four: Processes, tmp_path: Path, name: str) -> None:
    """Losses with clipping; a checkpoint of any mesh loads under any other, bit by bit.

    At ten times this learning rate the models are done after 30 steps, and weights that differ by
    1e-7 in one process give losses that differ by 6e-3.
    """
    meshes = meshes_of(name)
    planned = [{**MESHES[mesh], "dropout": name in WHOLE} for mesh in meshes]
    paths = [str(tmp_path / str(number)) for number in range(len(meshes))]
    expected = local(name, STEPS)
    saved: list[dict[str, Any]] = []
    for mesh, path, own in zip(meshes, paths, planned, strict=True):
        given = {"name": name, "planned": own, "steps": STEPS // 2, "path": path}
        found = four.run("slice_jobs.trained", **given)
        worst = difference(found[0]["losses"], expected)
        print(f"{name} {mesh}: {worst:.1e} after {STEPS} steps, {tied(found)[0]} on several ranks")
        assert worst < 1e-5
        assert max(found[0]["norms"]) > slice_jobs.MAX_NORM  # clipping was on
        assert not tied(found)[1]
        assert found[0]["read"] == found[0]["state"]  # by from_pretrained
        saved += found[:1]
    for own in planned:
        given = {"name": name, "planned": own, "steps": STEPS_AFTER, "paths": paths}
        found = four.run("slice_jobs.continued", **given)
        for before, after in zip(saved, found[0], strict=True):
            assert after["state"] == before["state"]
            assert after["dcp"].items() <= before["state"].items()
            later = expected[STEPS // 2 : STEPS // 2 + STEPS_AFTER]
            assert difference(after["losses"], later) < 1e-5
