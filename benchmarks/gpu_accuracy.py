"""How right the GPU prices are: ``python -m benchmarks.gpu_accuracy [--rows F] [--json]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.gpu_models import CapturedLayers, captured_layers
from benchmarks.gpu_rows import Chunk, GpuRow, UnjudgedRowError, chunks_of, measured_s, read_row
from benchmarks.ipu_accuracy import spearman
from ipu_pipeline.backends.cluster.rank import Engine, RankBlock, RankPricer, ring_s
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.planner.schedules import PipelineShape, StageTimes, schedule_kind, step_seconds

SHARED = Path(__file__).parents[2] / "shared" / "data" / "gpu" / "published.json"


@dataclass(frozen=True)
class Run:
    row: GpuRow
    model: CapturedLayers
    machine: Machine
    pricer: RankPricer
    chunks: tuple[Chunk, ...]

    @classmethod
    def of(cls, row: GpuRow, machine: Machine | None = None) -> "Run":
        model = captured_layers(row)
        machine = machine or machine_by_name(row.machine)
        zero_bubble = "Zero Bubble" in row.source
        engine = Engine(
            fused=True,
            fused_attention=not zero_bubble,
            precision="" if row.precision == "bfloat16" else row.precision,
            gradient_bytes=4,
            dropout=row.raw.get("model", "").startswith("GPT "),
            tensor_overlap=0.5,
            expert_overlap=0.3,
        )
        pricer = RankPricer(model.graph, machine, row.sizes, engine)
        layer = sum(o.flops * o.count for o in model.layer(model.dense_layers).forward_ops)
        head = sum(b.forward_flops for b in model.blocks("head"))
        chunks = chunks_of(row, model.num_layers, head / layer, model.extra_layers)
        return cls(row, model, machine, pricer, chunks)

    @cached_property
    def stages(self) -> tuple[RankBlock, ...]:
        """Every stage as one block."""
        first, found = 0, []
        ends = [self.pricer.block(b) for b in self.model.blocks("embedding", "other")]
        heads = [self.pricer.block(b) for b in self.model.blocks("head", "loss")]
        dense = self.pricer.block(self.model.layer(0))
        sparse = self.pricer.block(self.model.layer(self.model.num_layers))
        for chunk in self.chunks:
            numbers = range(first, first + chunk.layers)
            first += chunk.layers
            of_dense = sum(n < self.model.dense_layers for n in numbers)
            parts = [(dense, of_dense), (sparse, chunk.layers - of_dense + chunk.extra)]
            parts += [(block, chunk.embedding) for block in ends]
            parts += [(block, chunk.head * (1 + chunk.extra)) for block in heads]
            found.append(_sum(parts))
        return tuple(found)

    def in_flight(self) -> tuple[float, ...]:
        row, sizes = self.row, self.row.sizes
        kind = "1f1b" if row.schedule in ("zb-2p", "interleaved_zero_bubble") else row.schedule
        found = schedule_kind(kind).in_flight(self.shape)
        extra = 0.0
        note, split = str(row.raw.get("note") or "").lower(), str(row.raw.get("split") or "")
        if "all stages" in split:
            extra = 2 if "vocab-1" in note else 1 if "vocab-2" in note else 0
            if "interlaced" in note:
                return tuple(1.5 * n for n in found)
        if row.schedule == "zb-2p":
            return tuple(float(2 * sizes.pp - 1) for _ in found)
        if row.schedule == "interleaved_zero_bubble":
            return tuple(float(sizes.pp) for _ in found)
        return tuple(n + extra for n in found)

    @cached_property
    def shape(self) -> PipelineShape:
        devices = [i % self.row.sizes.pp for i in range(len(self.chunks))]
        return PipelineShape.of(len(self.chunks), self.row.microbatches, devices)

    def step_s(self) -> float:
        row, sizes = self.row, self.row.sizes
        per_boundary = 2 * self.pricer.tokens * self.pricer.hidden / (sizes.tp * sizes.cp)
        share = self.machine.devices[0].kernels.link_share
        stride = sizes.num_devices // sizes.pp
        link = self.machine.link_between(0, min(stride, sizes.num_devices - 1))
        copy_s = link.latency_s + per_boundary / (link.bytes_per_s * share)
        if row.schedule == "interleaved" or sizes.pp == 1:
            copy_s = 0.0
        times = [
            StageTimes(s.forward_s + copy_s, s.backward_s + copy_s, s.backward_s / 2)
            for s in self.stages
        ]
        if row.schedule == "zb-2p":
            loads = [t.forward_s + t.backward_s for t in times]
            passes = max(loads) * row.microbatches
        else:
            passes = step_seconds(schedule_kind(row.schedule), self.shape, times)
        return passes + self.once_s()

    def once_s(self) -> float:
        worst = 0.0
        for rank in range(self.row.sizes.pp):
            own = self.stages[rank :: self.row.sizes.pp]
            dense = sum(s.dense_parameters for s in own)
            experts = sum(s.expert_parameters for s in own)
            reduction = self.pricer.reduction_s(dense, experts)
            hidden = sum(s.backward_s for s in own)
            worst = max(worst, self.pricer.update_s(dense, experts) + max(0, reduction - hidden))
        return worst

    def memory(self) -> tuple[float, ...]:
        kept, found = self.in_flight(), []
        for rank in range(self.row.sizes.pp):
            own = self.stages[rank :: self.row.sizes.pp]
            held = kept[rank :: self.row.sizes.pp]
            state = self.pricer.state_bytes(
                sum(s.dense_parameters for s in own), sum(s.expert_parameters for s in own)
            )
            found.append(
                state
                + sum(n * s.saved_bytes for n, s in zip(held, own, strict=True))
                + max(s.workspace_bytes for s in own)
            )
        return tuple(found)

    def memory_bytes(self) -> float:
        found = self.memory()
        return found[-1] if "last" in str(self.row.raw.get("memory_of")) else max(found)


def _sum(parts: Sequence[tuple[RankBlock, float]]) -> RankBlock:
    parts = [(b, n) for b, n in parts if n]
    return RankBlock(
        sum(b.forward_s * n for b, n in parts),
        sum(b.backward_s * n for b, n in parts),
        sum(b.saved_bytes * n for b, n in parts),
        max((b.workspace_bytes * min(n, 1) for b, n in parts), default=0.0),
        sum(b.dense_parameters * n for b, n in parts),
        sum(b.expert_parameters * n for b, n in parts),
    )


def judge(raw: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"id": raw.get("id"), "source": raw.get("source"), "quality": str(raw.get("quality"))[:1]}
    try:
        row = read_row(raw)
        run = Run.of(row)
        try:
            published = measured_s(row, run.model.num_layers)
        except UnjudgedRowError:
            published = None
    except UnjudgedRowError as error:
        return {**found, "reason": str(error)}
    found["source"] = row.source
    found["predicted_s"] = step = run.step_s()
    found["published_s"] = published
    if published:
        found["time_error"] = step / published - 1
    memory = run.memory_bytes()
    found["predicted_gb"] = memory / 1e9
    device = run.machine.devices[0]
    found["fits"] = memory <= device.memory_bytes
    if row.memory_bytes:
        found["published_gb"] = row.memory_bytes / 1e9
        found["memory_error"] = memory / row.memory_bytes - 1
    return found


def report(raws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [judge(raw) for raw in raws]
    judged = [row for row in rows if "reason" not in row and row["quality"] == "A"]
    times = [abs(r["time_error"]) for r in judged if "time_error" in r]
    memory = [r["memory_error"] for r in judged if "memory_error" in r]
    timed = [r for r in judged if "time_error" in r]
    return {
        "time_mean": sum(times) / len(times),
        "time_worst": max(times),
        "memory_mean": sum(map(abs, memory)) / len(memory),
        "memory_worst": max(map(abs, memory)),
        "memory_under_share": sum(m < -0.02 for m in memory) / len(memory),
        "refused_share": sum(not r["fits"] for r in judged) / len(judged),
        "spearman": spearman([r["predicted_s"] for r in timed], [r["published_s"] for r in timed]),
        "judged": len(judged),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=SHARED)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    raw = json.loads(given.rows.read_text())
    found = report(raw["rows"] if isinstance(raw, dict) else raw)
    if given.json:
        print(json.dumps(found))
        return
    for r in found["rows"]:
        print(r["quality"], str(r["id"])[:70].ljust(70), r.get("reason") or f"{r.get('time_error', 9):+.3f} {r.get('memory_error', 9):+.3f} {r['predicted_s']:.3f} {r['predicted_gb']:.1f} {r['fits']}")
    print({k: v for k, v in found.items() if k != "rows"})


if __name__ == "__main__":
    main()
