"""The prediction of somebody's layout as text: every rank, the whole step, and our split."""

from __future__ import annotations

from ipu_pipeline.backends.cluster.layouts.megatron_layout import layout_of
from ipu_pipeline.backends.cluster.prices.parallel_sizes import sizes_of
from ipu_pipeline.backends.cluster.prices.rank_plan import rank_step_of
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.rates import rates_of
from ipu_pipeline.ir.text import GIGABYTES, milliseconds, render_table
from ipu_pipeline.planner.report.compare import reason


def layout_text(given: Plan, ours: Plan | None, problem: str = "") -> str:
    """Return the prediction of a given split, and of ours for the same sizes.

    Args:
        given: The given one.
        ours: Ours; ``None``: there is none.
        problem: Why there is none.
    """
    sizes = sizes_of(given)
    parts = [f"{name} {getattr(sizes, name)}" for name in ("tp", "cp", "ep", "dp")]
    layout = layout_of(given.graph, [stage.blocks for stage in given.stages])
    lines = [
        f"Layout of {given.model.model_class} on {given.machine.name}: pp {sizes.pp} x vpp "
        f"{sizes.vpp}, {', '.join(parts)}, ZeRO {sizes.zero_stage}; {given.schedule}, "
        f"{count_of(given.num_microbatches, 'microbatch')} of {given.micro_batch_size}",
        _rank_table(given),
        f"predicted step {milliseconds(given.objective_s)} ms{_rates(given)}",
        *(f"DOES NOT FIT: {text}" for text in given.misfits),
    ]
    if layout.num_extra_layers:
        lines.append(
            "m (multi-token prediction) is priced as a layer more where it stands, and a head and "
            "a loss more in the stage of L"
        )
    return "\n".join([*lines, *_ours(given, ours, problem)])


def _rank_table(plan: Plan) -> str:
    """Return one row per rank: what it holds, how long it works for a microbatch, its bytes."""
    peaks = [one.total for one in rank_step_of(plan).rank_bytes]
    device = plan.machine.devices[0]
    room = device.memory_bytes - device.reserved_bytes
    rows = []
    for rank, peak in enumerate(peaks):
        own = [stage for stage in plan.stages if stage.device == rank]
        letters = layout_of(plan.graph, [stage.blocks for stage in own])
        seconds = [
            sum(getattr(stage, name) for stage in own)
            for name in ("forward_s", "backward_s", "transfer_s")
        ]
        rows.append((f"{rank}: {letters}", *map(milliseconds, seconds), GIGABYTES(peak),
                     GIGABYTES(room - peak)))  # fmt: skip
    columns = ("rank", "forward ms", "backward ms", "transfer ms", "peak GB", "free GB")
    return render_table(columns, rows)


def _rates(plan: Plan) -> str:
    rates = rates_of(plan)
    return "" if rates is None else f": {rates.text()}"


def _ours(given: Plan, ours: Plan | None, problem: str) -> list[str]:
    if ours is None:
        return [f"ours: none for the same sizes: {problem}"]
    layout = layout_of(ours.graph, [stage.blocks for stage in ours.stages])
    bound = "no lower bound is known"
    if ours.lower_bound_s:
        bound = f"no split is faster than {milliseconds(ours.lower_bound_s)} ms"
        bound += f" (gap {ours.gap:.1%})"
    fullest = rank_step_of(ours).peak_bytes
    return [
        f"ours for the same sizes: {layout}",
        f"ours: step {milliseconds(ours.objective_s)} ms{_rates(ours)}, fullest rank "
        f"{GIGABYTES(fullest)} GB; {bound}",
        f"why: {reason(given, ours, ('the layout', 'ours'))}",
    ]
