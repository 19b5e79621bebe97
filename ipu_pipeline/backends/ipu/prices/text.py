"""A prediction as plain text: memory by IPU and kind, the parts of a step, notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from ipu_pipeline.backends.ipu.prices.memory import IPUMemory

if TYPE_CHECKING:
    from ipu_pipeline.backends.ipu.prices.predict import Prediction

_MEGABYTE = 1e6


def prediction_text(prediction: Prediction) -> str:
    """Return the report that ``explain`` prints."""
    parts = [_headline(prediction), "", *_memory_table(prediction), "", *_stage_table(prediction)]
    parts += ["", *_step_table(prediction)]
    if prediction.notes:
        parts += ["", *(f"! {note}" for note in prediction.notes)]
    return "\n".join(parts) + "\n"


def _headline(prediction: Prediction) -> str:
    settings = prediction.settings
    mode = "training" if settings.training else "inference"
    return (
        f"{prediction.samples_per_s:.1f} samples/s in {mode} on {settings.replicas} x "
        f"{settings.num_ipus} {prediction.chip.name} ({prediction.samples_per_step} samples in "
        f"{prediction.time.total_s * 1e3:.1f} ms); {'fits' if prediction.fits else 'DOES NOT FIT'}"
    )


def _memory_table(prediction: Prediction) -> list[str]:
    kinds = [item.name for item in fields(IPUMemory)]
    rows = [["MB per IPU", *kinds, "total", "fullest tile"]]
    for ipu, memory in enumerate(prediction.memory):
        share = memory.fullest_tile_bytes(prediction.chip) / prediction.chip.tile_memory_bytes
        sizes = [f"{getattr(memory, kind) / _MEGABYTE:.0f}" for kind in kinds]
        rows.append([f"{ipu}", *sizes, f"{memory.total_bytes / _MEGABYTE:.0f}", f"{share:.0%}"])
    return _aligned(rows)


def _stage_table(prediction: Prediction) -> list[str]:
    rows = [["stage", "IPU", "blocks", "forward ms", "backward ms", "recompute ms"]]
    for position, (stage, time) in enumerate(
        zip(prediction.layout.stages, prediction.time.stages, strict=True)
    ):
        blocks = (
            stage.blocks[0]
            if len(stage.blocks) == 1
            else (f"{stage.blocks[0]} .. {stage.blocks[-1]}")
        )
        seconds = (time.forward_s, time.backward_s, time.recompute_s)
        rows.append(
            [f"{position}", f"{stage.ipu}", blocks, *(f"{value * 1e3:.3f}" for value in seconds)]
        )
    return _aligned(rows)


def _step_table(prediction: Prediction) -> list[str]:
    time = prediction.time
    fill, main, flush = time.num_cycles
    rows = [
        ["part of a step", "ms", "note"],
        ["fill", f"{time.fill_s * 1e3:.2f}", f"{fill} cycles"],
        ["main", f"{time.main_s * 1e3:.2f}", f"{main} cycles of {time.cycle_s * 1e3:.3f} ms, of "
         f"these {time.copy_s * 1e3:.3f} copies and {time.input_s * 1e3:.3f} input"],
        ["flush", f"{time.flush_s * 1e3:.2f}", f"{flush} cycles"],
        ["optimizer", f"{time.optimizer_s * 1e3:.2f}", ""],
        ["state streaming", f"{time.streaming_s * 1e3:.2f}", ""],
        ["all-reduce", f"{time.all_reduce_s * 1e3:.2f}", ""],
        ["host", f"{time.host_s * 1e3:.2f}", ""],
    ]  # fmt: skip
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
