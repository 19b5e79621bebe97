"""Two plans side by side, and what makes the difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.rates import rates_of
from ipu_pipeline.ir.text import milliseconds, render_table, shortened, unit_of
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.planner.schedules.timeline import Timeline

_SAME = 5e-4  # relative difference that is called none


@dataclass(frozen=True)
class Pace:
    """The device that works longest for one microbatch of a plan.

    Attributes:
        device: Its position.
        seconds: Forward, backward and copies of all of its stages.
        blocks: What it holds.
    """

    device: int
    seconds: float
    blocks: tuple[str, ...]


def pace_of(plan: Plan) -> Pace:
    """Return the busiest device of a plan."""
    loads: dict[int, float] = {}
    for stage in plan.stages:
        own_s = stage.forward_s + stage.backward_s + stage.transfer_s
        loads[stage.device] = loads.get(stage.device, 0.0) + own_s
    device = max(loads, key=lambda one: loads[one])
    blocks = tuple(name for s in plan.stages if s.device == device for name in s.blocks)
    return Pace(device, loads[device], blocks)


def reason(first: Plan, second: Plan, names: Sequence[str]) -> str:
    """Return one sentence: why the second plan's step takes more or less than the first's."""
    samples = [plan.total_batch_size for plan in (first, second)]
    seconds = [plan.objective_s for plan in (first, second)]
    if not all(seconds):
        return "a step of one of them takes no time"
    times = (seconds[0] / samples[0]) / (seconds[1] / samples[1])
    if abs(times - 1) < _SAME:
        busiest = pace_of(second)
        return (
            f"{names[0]} and {names[1]} take the same time; the busiest device of {names[1]} "
            f"(device {busiest.device}: {_counted(second, busiest.blocks)}) works "
            f"{milliseconds(busiest.seconds)} ms a microbatch, that of {names[0]} "
            f"{milliseconds(pace_of(first).seconds)} ms"
        )
    faster = f"{names[1]} trains {times:.3f} times as many samples/s as {names[0]}"
    pairs = {
        "runs on {}, not {}": [(_num_devices(plan), "device") for plan in (first, second)],
        "has {} a step, not {}": [(p.num_microbatches, "microbatch") for p in (first, second)],
    }
    other = [
        text.format(count_of(*after), before[0])
        for text, (before, after) in pairs.items()
        if before != after
    ]
    if other:
        return f"{faster}: it {', and '.join(other)}"
    paces = [pace_of(plan) for plan in (first, second)]
    slower_s = seconds[1] - seconds[0]
    paced_s = first.num_microbatches * (paces[1].seconds - paces[0].seconds)
    if slower_s and paced_s / slower_s >= 0.5:
        works = [
            f"{milliseconds(pace.seconds)} ms a microbatch in {name} (device {pace.device}: "
            f"{_counted(plan, pace.blocks)})"
            for pace, name, plan in zip(paces, names, (first, second), strict=True)
        ]
        return f"{faster}: its busiest device works {works[1]}, against {works[0]}"
    return (
        f"{faster}: the busiest devices work about equally long, and filling and emptying the "
        f"pipeline, copies and the update take {milliseconds(abs(slower_s - paced_s))} ms "
        f"{'more' if slower_s > paced_s else 'less'}"
    )


def _num_devices(plan: Plan) -> int:
    """Return how many devices work for a plan, all replicas together."""
    rates = rates_of(plan)
    return rates.num_devices if rates else 0


def _counted(plan: Plan, blocks: Sequence[str]) -> str:
    """Return what a device holds: ``10 layers, embed_tokens``."""
    kinds = {block.name: block.kind for block in plan.blocks}
    layers = sum(kinds[name] == "layer" for name in blocks)
    others = [name for name in blocks if kinds[name] != "layer"]
    parts = [count_of(layers, "layer")] if layers else []
    parts += [shortened(others)] if others else []
    return ", ".join(parts) or "nothing"


def compare_text(first: Plan, second: Plan, names: Sequence[str]) -> str:
    """Return two plans as one table, what they decide differently, and why one is faster."""
    columns = [_figures(plan, simulate(plan)) for plan in (first, second)]
    keys = dict.fromkeys([*columns[0], *columns[1]])
    rows = [(key, *(column.get(key, "-") for column in columns)) for key in keys]
    lines = [render_table(("", *names), rows), *_differences(first, second)]
    return "\n".join([*lines, f"{reason(first, second, names)}."])


def _figures(plan: Plan, timeline: Timeline) -> dict[str, str]:
    rates, replicas = rates_of(plan), count_of(plan.replicas, "replica")
    devices = count_of(len({stage.device for stage in plan.stages}), "device")
    unit = unit_of(plan.machine)
    bound = milliseconds(plan.lower_bound_s) if plan.lower_bound_s else "not known"
    peak = max((curve.peak_bytes for curve in timeline.memory), default=0)
    found = {
        "model": plan.model.model_class,
        "machine": plan.machine.name,
        "stages": f"{plan.num_stages} on {devices}",
        "devices of all replicas": str(_num_devices(plan)),
        "schedule": plan.schedule,
        "batch": f"{plan.num_microbatches} x {plan.micro_batch_size} x {replicas}",
        "step ms": milliseconds(plan.objective_s),
        "busiest device ms a microbatch": milliseconds(pace_of(plan).seconds),
        "bubble": f"{timeline.bubble_fraction:.1%}",
        "lower bound ms": bound,
        "gap": f"{plan.gap:.1%}" if plan.lower_bound_s else "-",
        f"fullest device {unit.name}": unit(peak),
        "fits": "no" if plan.misfits else "yes",
    }
    if rates is not None:
        found["samples/s"] = f"{rates.samples_per_s:,.1f}"
        if rates.tokens_per_s is not None:
            found["tokens/s"] = f"{rates.tokens_per_s:,.0f}"
        if rates.mfu is not None:
            found["MFU"] = f"{rates.mfu:.1%}"
    return found


def _setting(plan: Plan, name: str) -> Any:
    """Return a setting as shown; GPUs run this project's own engine where none is named."""
    gpus = plan.machine.devices[0].kernels is not None
    found = plan.settings.get(name, "torch" if gpus and name == "engine" else "not set")
    return ", ".join(map(str, found)) if isinstance(found, list | tuple) else found


def _differences(first: Plan, second: Plan) -> Iterator[str]:
    """Yield what the plans decide differently, one line each."""
    if first.model != second.model:
        yield "they are plans of different models: their times say little about each other"
    for name in sorted({*first.settings, *second.settings}):
        own, other = (_setting(plan, name) for plan in (first, second))
        if own != other and not all(value in ("not set", 1) for value in (own, other)):
            yield f"{name}: {own} against {other}"
    recomputed = [sum(len(stage.recompute) for stage in plan.stages) for plan in (first, second)]
    if recomputed[0] != recomputed[1]:
        yield f"recomputed blocks: {recomputed[0]} against {recomputed[1]}"
    if first.num_stages == second.num_stages:
        moved = [
            index
            for index, (a, b) in enumerate(zip(first.stages, second.stages, strict=True))
            if a.blocks != b.blocks
        ]
        if moved:
            yield f"stages {', '.join(map(str, moved))} hold other blocks"
