"""Plans with chosen stage times, without a model: one block per stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ipu_pipeline.ir.graph import Block, BlockGraph, ParameterSpec, TensorSpec
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import ModelIdentity, Plan, PlannedStage
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind
from ipu_pipeline.planner.schedules.objective import StagePrice

STASH, WEIGHTS, WORKSPACE = 1000, 50_000, 300
LINK = Link(bytes_per_s=1e6, latency_s=1e-4)
ELEMENTS = 250  # float32: 1000 bytes, 1.1 ms over the link


def machine(num_devices: int, *, shared_memory: bool = False, link: Link = LINK) -> Machine:
    devices = tuple(Device(f"d{i}", 10**6, {"float32": 1e9}, 1e9) for i in range(num_devices))
    return Machine("toy", devices, link, shared_memory=shared_memory)


def _graph(tensors: Sequence[TensorSpec], *, training: bool) -> BlockGraph:
    """One block per stage, each with a parameter of its own."""
    names = [f"b{i}" for i in range(len(tensors) + 1)]
    return BlockGraph(
        "Toy",
        tuple(
            Block(
                name,
                "layer",
                name,
                (f"{name}.weight",),
                tuple(spec.name for spec in tensors[:i][-1:]),
                tuple(spec.name for spec in tensors[i : i + 1]),
                saved_bytes=STASH,
                workspace_bytes=WORKSPACE,
            )
            for i, name in enumerate(names)
        ),
        tuple(tensors),
        (TensorSpec("ids", (2, 8), "int64"),),
        # 16 bytes each: weight, gradient, and two moments of the optimizer
        tuple(
            ParameterSpec(f"{name}.weight", (WEIGHTS // 16,), "float32", blocks=(name,))
            for name in names
        ),
        training=training,
    )


def make_plan(
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    num_microbatches: int,
    schedule: str = "1f1b",
    *,
    devices: Sequence[int] | None = None,
    copies: bool = False,
    outer_s: float = 0.0,
) -> Plan:
    """Return an unedited plan whose objective is the solver's closed form for these times."""
    depth, training = len(forward_s), any(backward_s)
    devices = list(range(depth)) if devices is None else list(devices)
    tensors = tuple(
        TensorSpec(f"t{i}", (ELEMENTS,), "float32", True, f"b{i}", (f"b{i + 1}",))
        for i in range(depth - 1)
    )
    sent = [copies and devices[i] != devices[i + 1] for i in range(depth - 1)]
    one_way = LINK.transfer_s(tensors[0].num_bytes) if tensors else 0.0
    prices = []
    for i in range(depth):
        each = one_way * sum(sent[max(0, i - 1) : i + 1])
        prices.append(
            StagePrice(forward_s[i], backward_s[i], each, each if training else 0.0, outer_s, 0, ())
        )
    kind = schedule_kind(schedule)
    shape = PipelineShape.of(depth, num_microbatches, devices, training=training)
    kept = kind.in_flight(shape)
    stages = []
    for i, price in enumerate(prices):
        depth_here = kept[i]
        entering = 4 * ELEMENTS if i else 0
        stages.append(
            PlannedStage(
                devices[i],
                (f"b{i}",),
                forward_s=forward_s[i],
                backward_s=backward_s[i],
                transfer_s=price.send_forward_s + price.send_backward_s,
                memory_bytes=WEIGHTS + depth_here * (STASH + entering) + WORKSPACE,
                in_flight=depth_here,
            )
        )
    form = kind.objective(shape)
    made = Plan(
        model=ModelIdentity("Toy", {}),
        machine=machine(max(devices) + 1, shared_memory=not copies),
        stages=tuple(stages),
        graph=_graph(tensors, training=training),
        measured_s={f"b{i}": (forward_s[i], backward_s[i]) for i in range(depth)},
        settings={"update_s": {f"b{i}": outer_s for i in range(depth)}},
        num_microbatches=num_microbatches,
        schedule=schedule,
        objective_s=form.seconds(devices, prices),
        lower_bound_s=form.seconds(devices, prices),
        binding="time: stage 0 paces",
    )
    return replace(made, decision_digest=made.digest())
