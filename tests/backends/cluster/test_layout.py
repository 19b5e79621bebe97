"""Which rank runs what, and what a schedule refuses before anything is started."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.backends.cluster.launch.spec import choose_processes
from ipu_pipeline.backends.cluster.layout import (
    Layout,
    make_layout,
    position_of_stages,
    torch_schedule,
    torch_schedules,
)
from ipu_pipeline.backends.cluster.ranks.consistency import check
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.planner.backend import backend_of
from ipu_pipeline.planner.price import price
from ipu_pipeline.planner.schedules import PipelineShape
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.stages.executable import ExecutionOptions
from tests.backends.cluster.jobs import built
from tests.tiny_models import TINY


def test_every_schedule_is_one_of_torchs() -> None:
    for kind in torch_schedules():
        assert hasattr(torch.distributed.pipelining, kind.torch_class)
        assert torch_schedule(kind.torch_class) is kind
        assert torch_schedule(kind.name.upper()) is kind


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("interleaved", [(0, 3), (1, 4), (2, 5)]), ("zbv", [(0, 5), (1, 4), (2, 3)])],
)
def test_stages_of_the_ranks(schedule: str, expected: list[tuple[int, ...]]) -> None:
    positions = position_of_stages(schedule, 6, 3, 6)
    layouts = [Layout(rank, 2, 3, 6, positions) for rank in range(6)]
    assert [layout.own_stages for layout in layouts] == expected * 2
    assert [layout.replica for layout in layouts] == [0, 0, 0, 1, 1, 1]


def test_ranks_of_slices_are_neighbours(make_plan) -> None:
    plan = replace(make_plan(2, replicas=2), machine=machine_by_name("h100-x8"))
    plan = replace(plan, settings={"tp": 2})
    layouts = [make_layout(plan, "1f1b", rank, 8) for rank in range(8)]
    assert [layout.slice for layout in layouts] == [0, 1] * 4
    assert [layout.position for layout in layouts] == [0, 0, 1, 1] * 2
    assert [layout.replica for layout in layouts] == [0] * 4 + [1] * 4
    with pytest.raises(LoweringError, match="2 replicas x tp 2, which cannot share 6 processes"):
        make_layout(plan, "1f1b", 0, 6)
    with pytest.raises(LoweringError, match="2 stages x 2 replicas x tp 2; start 8"):
        make_layout(plan, "1f1b", 0, 16)
    edited = replace(make_plan(2), settings={"tp": 2})
    with pytest.raises(LoweringError, match=r"have tp 2, which is for GPUs .* has none; leave it"):
        make_layout(edited, "1f1b", 0, 2)


@pytest.mark.parametrize(
    ("name", "stages", "ranks", "microbatches", "message"),
    [
        ("popart", 2, 2, 4, "has no schedule 'popart'; use one of 1f1b, gpipe"),
        ("1f1b", 4, 2, 4, "1f1b runs one stage per process: 4 stages do not fit 2 processes"),
        ("interleaved", 3, 2, 4, "3 stages do not fit 2 processes; start as many"),
        (
            "zbv",
            2,
            2,
            4,
            "zbv runs exactly 2 stages per process, which they visit in a V: 2 stages",
        ),
        ("1f1b", 4, 4, 2, "at least as many microbatches as stages, got 2 microbatches and 4"),
        ("interleaved", 4, 2, 5, "in 2 equal groups of at least 2: 5 microbatches do not divide"),
    ],
)
def test_what_a_schedule_cannot_run_is_refused(
    name: str, stages: int, ranks: int, microbatches: int, message: str
) -> None:
    with pytest.raises(LoweringError, match=message):
        position_of_stages(name, stages, ranks, microbatches)


def test_processes_that_cannot_be_shared_out_are_refused() -> None:
    _, plan, _ = built("bert-qa", num_stages=2, replicas=2)
    assert make_layout(plan, "1f1b", 3, 4).replica == 1
    with pytest.raises(LoweringError, match="2 replicas, which cannot share 3 processes"):
        make_layout(plan, "1f1b", 0, 3)
    with pytest.raises(LoweringError, match="8 processes are more than the plan's 2 stages x 2"):
        make_layout(plan, "1f1b", 0, 8)


def test_modes_of_other_targets_are_refused() -> None:
    _, plan, _ = built("bert-qa", num_stages=2)
    check(plan, ExecutionOptions())
    with pytest.raises(LoweringError, match="use the local target for the sequential reference"):
        check(plan, ExecutionOptions(sequential=True))


def test_a_script_without_torchrun_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    model, plan, _ = built("bert-qa", num_stages=2)
    with pytest.raises(LoweringError, match="is not set; start the script with 'torchrun"):
        ipp.compile(model, plan, target="distributed")


@pytest.mark.parametrize("kind", torch_schedules(), ids=lambda kind: kind.name)
def test_what_is_planned_for_a_schedule_is_launched_and_priced_alike(kind) -> None:
    """Four of the machine's GPUs, as many stages on each as the schedule takes."""
    model, example = TINY["bert-qa"].build()
    depth = 4 * kind.stages_per_device[0]
    plan = ipp.plan(
        model,
        example,
        machine="a100-80g-x8",
        num_stages=depth,
        microbatches=8,
        schedule=kind.name,
        granularity="sublayer",
        constraints=ipp.Constraints(stage_devices=kind.place(depth, 4)),
    )
    assert kind.name in backend_of(plan.machine).schedules
    assert plan.objective_s == price(plan).step_s == simulate(plan).step_s
    assert plan.lower_bound_s <= plan.objective_s
    assert [stage.in_flight for stage in plan.stages] == list(
        kind.in_flight(PipelineShape.of(depth, 8, kind.place(depth, 4)))
    )
    assert choose_processes(plan, kind.name, room=8) == 4
    assert make_layout(plan, kind.name, 1, 4).positions == kind.place(depth, 4)


def test_a_schedule_that_the_machine_does_not_run_is_not_planned() -> None:
    model, example = TINY["bert-qa"].build()
    with pytest.raises(ValueError, match="a100-80g-x8 runs no schedule 'popart'; use one of 1f1b"):
        ipp.plan(model, example, machine="a100-80g-x8", num_stages=2, schedule="popart")
