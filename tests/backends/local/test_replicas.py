"""Replicas of one process: one set of weights, microbatches at the same time, the same sums."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.backends.local.executable import LocalExecutable
from ipu_pipeline.errors import LoweringError, PipelineError, StageError
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.backend import find_machine
from ipu_pipeline.planner.price import beside_bytes, price
from ipu_pipeline.planner.schedules import schedule_names
from tests.backends.local.helpers import assert_equals_eager
from tests.backends.local.test_serialize import serialized
from tests.later import in_turn
from tests.stateful import PROGRAMS, assert_alike, planned, trained, trained_plainly
from tests.tiny_models import TINY

STEPS = 3


def large_batch(name: str, samples: int = 8) -> dict[str, Tensor]:
    return TINY[name].batch(batch_size=samples, seed=3)


def plan_of(name: str, stages: int = 1, replicas: int = 2, **options: Any) -> ipp.Plan:
    """Return a plan for eight samples in microbatches of two."""
    model, example = TINY[name].build(dropout=options.pop("dropout", False))
    number = {"num_stages": stages, "microbatches": 4 // replicas, "replicas": replicas}
    return ipp.plan(model, example, **number, **options)


# Each architecture once, each way several times.
@pytest.mark.parametrize(("name", "stages", "replicas"), in_turn(TINY, (1, 2), (2, 4)))
def test_loss_and_every_gradient_equal_eager(name: str, stages: int, replicas: int) -> None:
    model, _ = TINY[name].build()
    assert_equals_eager(model, plan_of(name, stages, replicas), large_batch(name))


def curve(name: str, plan: ipp.Plan, *batches: dict[str, Tensor], **options: Any) -> list[float]:
    model, _ = TINY[name].build(dropout=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with ipp.compile(model, plan, optimizer=optimizer, self_check=False, **options) as executable:
        return [executable.train_step(one).loss for one in batches]


# Those that two microbatches and so many stages can run.
WAYS = {*product(schedule_names(), (1, 2))} - {("dualpipev", 1), ("zbv", 1), ("popart", 2)}


@pytest.mark.parametrize(
    ("way", "name"), in_turn([(way,) for way in sorted(WAYS)], ("gpt2-lm", "t5", "bert-mlm"))
)
def test_curves_with_dropout_do_not_depend_on_replicas(way: tuple[str, int], name: str) -> None:
    batches = [large_batch(name)] * STEPS
    expected = curve(name, plan_of(name, replicas=1, dropout=True), *batches)
    schedule, stages = way
    plan = plan_of(name, stages, dropout=True)
    found = curve(name, plan, *batches, schedule=schedule)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found == curve(name, plan, *batches, schedule=schedule)  # bit for bit


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"recompute": "all"},
        {"sequential": True},
        {"master_weights": True, "precision": "bf16"},
        {"max_grad_norm": 0.1},
    ],
)
def test_ways_to_run(options: dict[str, Any]) -> None:
    batches = [large_batch("gpt2-lm")] * STEPS
    plans = [plan_of("gpt2-lm", replicas=replicas, dropout=True) for replicas in (1, 2)]
    expected, found = (curve("gpt2-lm", plan, *batches, **options) for plan in plans)
    rough = "precision" in options  # one rounding more to bfloat16 is 1 in 256
    assert found == pytest.approx(expected, rel=2e-3 if rough else 1e-5)


def test_a_table_in_slices() -> None:
    plans = [plan_of("gpt2-lm", replicas=replicas) for replicas in (1, 2)]
    plans = [serialized(plan, {"transformer.wte": 2, "lm_head": 3}) for plan in plans]
    found = [curve("gpt2-lm", plan, *[large_batch("gpt2-lm")] * STEPS) for plan in plans]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 7])
def test_short_batches(samples: int) -> None:
    """A replica may have fewer microbatches than another, or none."""
    batches = [large_batch("bert-mlm", samples), large_batch("bert-mlm", 8)]
    plans = [plan_of("bert-mlm", 2, replicas, dropout=True) for replicas in (1, 4)]
    expected, found = (curve("bert-mlm", plan, *batches) for plan in plans)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "stages"), in_turn(PROGRAMS, [1, 2]))
def test_programs_that_keep_something(name: str, stages: int) -> None:
    """One after another, as in plain training, or refused: attributes that passes replace."""
    expected = trained_plainly(PROGRAMS[name]())
    model = PROGRAMS[name]()
    plan = planned(model, stages)
    plan = replace(plan, num_microbatches=plan.num_microbatches // 2, replicas=2)
    if name in ("Replacing", "Renewing", "Seldom"):
        with pytest.raises(LoweringError, match=f"{name}Layer.* changed in forward passes of 2"):
            trained(model, plan)
        return
    assert_alike(trained(model, plan), expected)


class Counts(nn.Linear):
    """A layer that counts its calls, or notes in a buffer that there was one."""

    def __init__(self, notes: str) -> None:
        super().__init__(8, 8)
        self.notes, self.calls = notes, 0
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.notes == "calls":
            self.calls += 1
        elif self.notes == "seen" and x.mean() > 1:
            self.seen += 1
        return super().forward(x)


class Net(nn.Module):
    def __init__(self, notes: str) -> None:
        super().__init__()
        self.layer = Counts(notes)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean()}


@pytest.mark.parametrize("notes", ["calls", "seen"])
def test_what_passes_of_two_replicas_change_is_refused(notes: str) -> None:
    """Also where the first steps have not changed it."""
    model = Net(notes)
    x = torch.randn(8, 8)
    given = {"x": x - x.mean(1, keepdim=True), "labels": torch.randn(8, 8)}
    few = {name: value[:2] for name, value in given.items()}
    plan = ipp.plan(model, few, num_stages=1, microbatches=2, replicas=2)
    before = model.layer.calls
    with ipp.compile(model, plan, self_check=False) as executable:
        if notes == "seen":
            executable.forward_backward(given)
            given = {**given, "x": given["x"] + 2}
        with pytest.raises(LoweringError, match=f"Counts.{notes} changed in forward passes of 2 r"):
            executable.forward_backward(given)
    assert model.layer.calls == before


def test_a_hook_on_a_gradient_is_refused() -> None:
    model, _ = TINY["bert-qa"].build()
    next(model.parameters()).register_hook(lambda gradient: gradient * 2)
    with (
        ipp.compile(model, plan_of("bert-qa"), self_check=False) as executable,
        pytest.raises(LoweringError, match=r"several replicas, each .* or plan with replicas=1"),
    ):
        executable.forward_backward(large_batch("bert-qa"))


def test_a_failing_replica_names_its_microbatch() -> None:
    model, _ = TINY["bert-qa"].build()
    given = large_batch("bert-qa")
    wrong = {**given, "input_ids": given["input_ids"].clone()}
    wrong["input_ids"][7, 0] = 10_000
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with ipp.compile(model, plan_of("bert-qa"), optimizer=optimizer) as executable:
        with pytest.raises(StageError, match=r"forward pass of microbatch 3\).* id 10000"):
            executable.train_step(wrong)
        for parameter, value in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=0)
        assert executable.train_step(given).loss > 0


def test_replicas_run_at_the_same_time() -> None:
    """Each on a thread of its own, with the samples of a batch in their order."""
    model, _ = TINY["bert-qa"].build()
    with ipp.compile(model, plan_of("bert-qa", 2), self_check=False) as executable:
        assert isinstance(executable, LocalExecutable)
        rows = executable._rows(2, 2).rows
    assert [sorted({action.microbatch for action in row}) for row in rows] == [[0, 1]] * 2 + [
        [2, 3]
    ] * 2


def test_a_spread_vocabulary_has_one_replica() -> None:
    model, example = TINY["gpt2-lm"].build()
    plan = ipp.plan(model, example, num_stages=2, microbatches=2, vocabulary="even")
    with pytest.raises(LoweringError, match="spreads the vocabulary over stages and has 2 repl"):
        ipp.compile(model, replace(plan, replicas=2))


def test_evaluation_is_that_of_one() -> None:
    model, _ = TINY["bert-qa"].build()
    results = []
    for replicas in (1, 2):
        with ipp.compile(model, plan_of("bert-qa", replicas=replicas)) as executable:
            results.append(executable.eval_step(large_batch("bert-qa")).loss)
    assert results[0] == results[1]


def test_replicas_are_priced() -> None:
    """They hold activations and gradients of their own, and their gradients are added up."""
    one, two = (plan_of("gpt2-lm", replicas=replicas) for replicas in (1, 2))
    machine = two.machine
    assert len(machine.devices) == 2
    assert len(one.machine.devices) == 1
    alone = price(replace(two, replicas=1))
    gradients = sum(p.num_bytes for p in two.graph.parameters if p.trainable)
    added_s = 3 * gradients / sum(device.memory_bytes_per_s for device in machine.devices)
    assert price(two).step_s == pytest.approx(alone.step_s + added_s)
    held = sum(load.memory_bytes for load in price(two).stages)
    beside = beside_bytes(two, price(two).stages)
    assert gradients < beside < held
    tight = _with_memory(machine, held + beside // 2)
    assert not price(replace(two, machine=tight, replicas=1)).misfits
    assert price(replace(two, machine=tight)).misfits


def _with_memory(machine: Machine, num_bytes: int) -> Machine:
    each = num_bytes // len(machine.devices) + 1
    devices = tuple(replace(d, memory_bytes=each, reserved_bytes=0) for d in machine.devices)
    return replace(machine, devices=devices)


def test_too_many_for_a_described_machine() -> None:
    model, example = TINY["bert-qa"].build()
    with pytest.raises(PipelineError, match="need 3 devices, the machine offers 2"):
        ipp.plan(model, example, machine=find_machine("local", 2), num_stages=1, replicas=3)
