"""The pictures of the site: small models, planned and drawn by the code that they explain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import transformers

import ipu_pipeline as ipp
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.text import milliseconds
from ipu_pipeline.planner.backend import backend_of
from ipu_pipeline.planner.price import workload_of
from ipu_pipeline.planner.report import figures
from ipu_pipeline.planner.schedules import schedule_kind, schedule_names
from ipu_pipeline.planner.schedules.simulate import simulate
from tools.docs.svg import draw

DEVICES, MICROBATCHES = 4, 8
LAYERS = 16
MACHINE = f"h100-x{DEVICES}"
_LAYER = "model.layers."


@cache
def model_and_batch() -> tuple[Any, Any]:
    """Return a Llama of 16 layers with a large vocabulary, without values, and a batch of 1."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    return from_config(config, "causal-lm", batch_size=1, seq_length=2048)


@cache
def planned(schedule: str) -> Plan:
    """Return that model's plan for four GPUs under a schedule; of ``popart`` a BERT's on IPUs."""
    if schedule == "popart":
        config = transformers.BertConfig(num_hidden_layers=12)
        bert, batch = from_config(config, "question-answering", batch_size=4, seq_length=128)
        return ipp.plan(bert, batch, machine="pod4", num_stages=DEVICES, microbatches=MICROBATCHES)
    depth = DEVICES * schedule_kind(schedule).stages_per_device[0]
    return ipp.plan(
        *model_and_batch(),
        machine=MACHINE,
        num_stages=depth,
        microbatches=MICROBATCHES,
        replicas=1,
        schedule=schedule,
    )


@cache
def even_layers() -> Plan:
    """Return the plan that gives every GPU the same number of layers."""
    names = [block.name for block in planned("1f1b").blocks]
    first, share = names.index(f"{_LAYER}0"), LAYERS // DEVICES
    cuts = [0, *(first + share * i for i in range(1, DEVICES)), len(names)]
    stages = [tuple(names[begin:end]) for begin, end in pairwise(cuts)]
    chosen = ipp.Constraints(num_microbatches=MICROBATCHES).with_stages(stages)
    return ipp.plan(
        *model_and_batch(),
        machine=MACHINE,
        num_stages=DEVICES,
        microbatches=MICROBATCHES,
        replicas=1,
        constraints=chosen,
    )


def _timelines() -> Iterator[tuple[str, str]]:
    """Draw the passes alone: copies are thin, and an update on IPUs is long."""
    for name in schedule_names():
        plan = planned(name)
        timeline = simulate(plan)
        passes = [event for event in timeline.events if event.kind in ("forward", "backward")]
        figure = figures.timeline_figure(plan, replace(timeline, events=tuple(passes)))
        yield f"timeline-{name}.svg", draw(figure, f"One step under {name}, four devices")


def schedules_compared() -> str:
    """Return a table: what one model costs under every schedule that GPUs run."""
    lines = ["| schedule | stages | step | bubble | fullest GPU | most microbatches kept |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name in schedule_names():
        if name == "popart":
            continue
        plan = planned(name)
        timeline = simulate(plan)
        kept = max(curve.in_flight for curve in timeline.memory)
        lines.append(
            f"| `{name}` | {plan.num_stages} | {milliseconds(timeline.step_s)} ms | "
            f"{timeline.bubble_fraction:.1%} | {timeline.peak_memory_bytes / 1e9:.1f} GB | {kept} |"
        )
    return "\n".join(lines) + "\n"


def _split() -> Iterator[tuple[str, str]]:
    plan, even = planned("1f1b"), even_layers()
    for name, one in (("stages", plan), ("stages-even", even)):
        figure = figures.stage_figure(one, simulate(one))
        yield f"{name}.svg", draw(figure, "Milliseconds of one microbatch on every stage")
    yield "split.md", _steps([("even layers", even), ("the search", plan)])


def _steps(rows: Sequence[tuple[str, Plan]]) -> str:
    bound = rows[-1][1].lower_bound_s
    lines = [
        "| split | layers of the stages | step | over the proven bound |",
        "|---|---|---:|---:|",
    ]
    for name, plan in rows:
        layers = [sum(_LAYER in block for block in stage.blocks) for stage in plan.stages]
        lines.append(
            f"| {name} | {', '.join(map(str, layers))} | {milliseconds(plan.objective_s)} ms | "
            f"{plan.objective_s / bound - 1:.1%} |"
        )
    lines.append(f"| no split is faster than | | {milliseconds(bound)} ms | |")
    return "\n".join(lines) + "\n"


def made() -> Iterator[tuple[str, str]]:
    """Yield every file: its name and its text."""
    yield from _timelines()
    yield "schedules-compared.md", schedules_compared()
    yield from _split()
    plan = planned("1f1b")
    timeline, costs = simulate(plan), backend_of(plan.machine).costs(workload_of(plan))
    charts = {
        "blocks": (figures.block_figure(plan, costs), "Milliseconds of every block"),
        "memory": (figures.memory_figure(plan, timeline), "Memory of every GPU by kind of use"),
        "memory-over-time": (figures.memory_curve_figure(plan, timeline), "Memory over a step"),
        "shares": (figures.share_figure(plan, timeline), "How every GPU spends the step"),
    }
    for name, (figure, title) in charts.items():
        yield f"{name}.svg", draw(figure, title)
    yield "plan.txt", plan.explain() + "\n"
