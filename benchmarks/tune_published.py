"""Tune BERT-large for a POD16 and hold the result against every published run of its batch.

    python -m benchmarks.tune_published [--only TEXT]

Prints one line a published row: samples/s of the tuned and of the published configuration, both
by the IPU model, and the seconds of the search.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import typer

from benchmarks.ipu_architectures import architecture, capture_architecture
from benchmarks.ipu_fit import SHARED
from benchmarks.ipu_observations import predict_row
from benchmarks.ipu_rows import Row, UnjudgeableRowError, load_rows, read_row
from ipu_pipeline.backends.ipu.prices import chip_named
from ipu_pipeline.backends.ipu.tune import (
    SETTINGS,
    TuneRequest,
    batch_divisions,
    front_of,
    pipelines_of,
)
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.text import render_table

CONFIGS = SHARED / "known_good_configs.json"
NUM_IPUS = 16

Key = tuple[Any, ...]  # global batch, architecture for one sample, front end


@dataclass(frozen=True)
class Comparison:
    """One published row against what the tuner found for the same global batch."""

    row: str
    tuned_samples_per_s: float
    published_samples_per_s: float
    published_fits: bool
    seconds: float


def published() -> Mapping[str, tuple[Key, list[Row]]]:
    """Return the rows of BERT-large training on 16 GC200, grouped by what a request fixes.

    Rows that place attention and feed-forward on IPUs of their own are left out: no
    ``ipu_config.json`` can say that.
    """
    found: dict[Key, list[Row]] = defaultdict(list)
    for raw in load_rows(CONFIGS) if CONFIGS.exists() else ():
        if raw.get("model") != "BERT-large" or raw.get("total_ipus") != NUM_IPUS:
            continue
        try:
            row = read_row(raw)
        except UnjudgeableRowError:
            continue
        if "Bow" in str(raw.get("hardware_target")) or not row.settings.training:
            continue
        wanted = replace(architecture(row), batch_size=1)
        if wanted.granularity == "layer":
            batch = row.micro_batch * row.settings.accumulation * row.settings.replicas
            found[batch, wanted, row.settings.front_end].append(row)
    return {f"{k[0]}-{k[1].task}-{k[1].seq_length}-{k[2]}": (k, r) for k, r in found.items()}


def compare(key: Key, rows: list[Row]) -> list[Comparison]:
    """Tune for the group's global batch, to the end, and predict each of its rows."""
    batch, wanted, front_end = key
    chip = chip_named("ipu-gc200")
    run = replace(
        SETTINGS,
        front_end=front_end,
        device_iterations=max(row.settings.device_iterations for row in rows),
        half_first_moment=any(row.settings.half_first_moment for row in rows),
    )
    asked = TuneRequest(batch, settings=run)
    found = batch_divisions(asked, NUM_IPUS)
    graphs = {
        size: capture_architecture(replace(wanted, batch_size=size))
        for size in {division.micro_batch for division in found}
    }
    pipelines = pipelines_of(found, graphs, machine_by_name(f"pod{NUM_IPUS}"), asked, chip)
    front = front_of(pipelines, asked, time_limit_s=0.0)
    compared = []
    for row in rows:
        theirs, _ = predict_row(row, graphs[row.micro_batch], chip)
        ours = front.points[0].samples_per_s
        compared.append(Comparison(row.id, ours, theirs.samples_per_s, theirs.fits, front.seconds))
    return compared


def main(only: str = "") -> None:
    """Compare every group whose name contains ``only``."""
    lines = [
        (
            c.row,
            f"{c.tuned_samples_per_s:.1f}",
            f"{c.published_samples_per_s:.1f}",
            "yes" if c.published_fits else "no",
            f"{c.seconds:.1f}",
        )
        for name, (key, rows) in published().items()
        if only in name
        for c in compare(key, rows)
    ]
    columns = ("published row", "tuned", "published", "published fits", "search s")
    typer.echo(render_table(columns, lines))


if __name__ == "__main__":
    typer.run(main)
