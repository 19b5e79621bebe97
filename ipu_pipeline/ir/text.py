"""Readable text for plans and blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan, PlannedStage
from ipu_pipeline.ir.rates import rates_of


def render_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an aligned table; the first column is text, the others are numbers.

    In a table of more than 160 characters the text goes on in the next line; numbers stay whole.
    """
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(
            column, justify="right" if index else "left", no_wrap=index > 0, overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    console = Console(
        file=StringIO(), width=160, color_system=None, highlight=False, markup=False, emoji=False
    )
    console.print(table)
    output = console.file
    assert isinstance(output, StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines() if line.strip())


def megabytes(num_bytes: float) -> str:
    """Format bytes as megabytes (10^6 bytes)."""
    return f"{num_bytes / 1e6:.1f}"


def about_megabytes(num_bytes: float) -> str:
    """Format bytes as megabytes with four digits, more where there are more before the point."""
    size = max(0.0, num_bytes) / 1e6
    return f"{size:.4g}" if size < 10_000 else f"{size:.0f}"


@dataclass(frozen=True)
class MemoryUnit:
    """What bytes are shown in.

    Attributes:
        name: Such as ``MB``.
        num_bytes: Bytes of one.
        digits: Behind the decimal point.
    """

    name: str
    num_bytes: float
    digits: int

    def __call__(self, num_bytes: float) -> str:
        """Format bytes, without the name."""
        return f"{num_bytes / self.num_bytes:.{self.digits}f}"


GIGABYTES = MemoryUnit("GB", 1e9, 2)
MEGABYTES = MemoryUnit("MB", 1e6, 1)


def unit_of(machine: Machine) -> MemoryUnit:
    """Return what the memory of a machine's devices is shown in: GB for GPUs."""
    return MEGABYTES if machine.devices[0].kernels is None else GIGABYTES


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds."""
    return f"{seconds * 1e3:.2f}"


def graph_table(graph: BlockGraph) -> str:
    """Return one row per block: its size and its work for one microbatch."""
    columns = ("block", "kind", "weights MB", "forward GFLOP", "backward GFLOP", "saved MB")
    rows = [
        (
            block.name,
            block.kind,
            megabytes(graph.parameter_bytes(block)),
            f"{block.forward_flops / 1e9:.3f}",
            f"{block.backward_flops / 1e9:.3f}",
            megabytes(block.saved_bytes),
        )
        for block in graph.blocks
    ]
    return render_table(columns, rows)


def explain_plan(plan: Plan) -> str:
    """Return the whole plan as text: what goes where, what it costs, how good it is and why."""
    bound = "no lower bound is known"
    if plan.lower_bound_s:
        least = milliseconds(plan.lower_bound_s)
        scope = ""
        if plan.machine.devices[0].kernels is not None:
            scope = f" with {count_of(plan.replicas, 'replica')}"
        bound = f"no split{scope} is faster than {least} ms (gap {plan.gap:.1%})"
    lines = [
        f"Plan for {plan.model.model_class} on {plan.machine.name}: "
        f"{count_of(plan.num_stages, 'stage')}, {plan.schedule}, "
        f"{count_of(plan.num_microbatches, 'microbatch')} of {plan.micro_batch_size}"
        + "".join(
            f", {name} {plan.settings[name]}"
            for name in ("tp", "cp", "ep")
            if plan.settings.get(name, 1) != 1
        )
        + (f", {plan.replicas} replicas" if plan.replicas > 1 else ""),
        stage_table(plan),
        f"predicted step {milliseconds(plan.objective_s)} ms; {bound}; costs: {plan.cost_source}",
    ]
    rates = rates_of(plan)
    if rates is not None and rates.mfu is not None:
        lines.append(rates.text())
        most = len(plan.machine.devices) * plan.replicas // rates.num_devices
        if most > plan.replicas:
            lines.append(
                f"{rates.num_devices} of {len(plan.machine.devices)} GPUs are used; more replicas, "
                "and as many more microbatches, would use the others"
            )
    if plan.binding:
        lines.append(f"limited by {plan.binding}")
    lines += annotation_lines(plan)
    if plan.tied_groups:
        groups = "; ".join(" = ".join(group) for group in plan.tied_groups)
        lines.append(f"tied weights: {groups}")
    if plan.edited:
        lines.append("the plan was edited by hand; these numbers are those of the edited plan")
    lines += [f"DOES NOT FIT: {text}" for text in plan.misfits]
    return "\n".join(lines)


def annotation_lines(plan: Plan) -> list[str]:
    """Return one line for each way in which blocks do not run plainly."""
    named: dict[str, list[str]] = {"recomputed": [], "offloaded": []}
    sliced, held = [], []
    for index, stage in enumerate(plan.stages):
        for what, blocks in (("recomputed", stage.recompute), ("offloaded", stage.offload)):
            ordered = [name for name in stage.blocks if name in blocks]
            if ordered:
                named[what].append(f"{shortened(ordered)} (stage {index})")
        sliced += [
            f"{name} in {stage.serialize[name]} slices (stage {index})"
            for name in stage.blocks
            if stage.serialize.get(name, 1) > 1
        ]
        held += [
            f"slice{f' {first}' if last - first == 1 else f's {first}-{last - 1}'} of {name} "
            f"(stage {index})"
            for name, (first, last) in stage.table_slices.items()
        ]
    rows = () if plan.vocabulary is None else plan.vocabulary.rows
    spread = [f"rows {first}-{end - 1} (stage {stage})" for stage, first, end in rows]
    named |= {"serialized": sliced, "table split": held, "vocabulary spread": spread}
    return [f"{what}: {'; '.join(parts)}" for what, parts in named.items() if parts]


def shortened(names: Sequence[str]) -> str:
    """Return names with runs of numbers joined: ``encoder.layer.0-5, pooler``."""
    runs: list[tuple[str, list[int]]] = []
    for name in names:
        stem, _, number = name.rpartition(".")
        if not (stem and number.isdecimal()):
            runs.append((name, []))
        elif runs and runs[-1][0] == stem and runs[-1][1][-1:] == [int(number) - 1]:
            runs[-1][1].append(int(number))
        else:
            runs.append((stem, [int(number)]))
    return ", ".join(
        stem + (f".{run[0]}" if run else "") + (f"-{run[-1]}" if len(run) > 1 else "")
        for stem, run in runs
    )


def stage_table(plan: Plan) -> str:
    """Return one row per stage."""
    unit, spread = unit_of(plan.machine), plan.vocabulary is not None
    columns = ("stage", "device", "blocks", "forward ms", "backward ms",
               *(["vocabulary ms"] * spread), "transfer ms", f"memory {unit.name}",
               "in flight")  # fmt: skip
    rows = [
        (
            f"{index}: {describe_blocks(stage)}",
            str(stage.device),
            str(len(stage.blocks)),
            milliseconds(stage.forward_s),
            milliseconds(stage.backward_s),
            *([milliseconds(stage.vocabulary_s)] * spread),
            milliseconds(stage.transfer_s),
            unit(stage.memory_bytes),
            str(stage.in_flight),
        )
        for index, stage in enumerate(plan.stages)
    ]
    return render_table(columns, rows)


def describe_blocks(stage: PlannedStage) -> str:
    """Return ``first .. last`` of a stage's blocks, and how many do not run plainly."""
    names = [name.rsplit(".", 2)[-2:] for name in (stage.blocks[0], stage.blocks[-1])]
    first, last = (".".join(part) for part in names)
    text = first if len(stage.blocks) == 1 else f"{first} .. {last}"
    counts = {
        "recomputed": len(stage.recompute),
        "offloaded": len(stage.offload),
        "serialized": len(stage.serialize),
    }
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{text} ({said})" if said else text
