"""A published GPU run as a pipeline of ranks: the model's layers, put together as it was split."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

from benchmarks.gpu_models import CapturedLayers, captured_layers
from benchmarks.gpu_rows import (
    Chunk,
    GpuRow,
    Raw,
    UnjudgedRowError,
    chunks_of,
    measured_s,
    parse_layout,
    read_row,
)
from ipu_pipeline.backends.cluster.parallel_sizes import MEGATRON
from ipu_pipeline.backends.cluster.rank import RankBlock, RankPricer, total_of
from ipu_pipeline.backends.cluster.rank_plan import in_stage
from ipu_pipeline.backends.cluster.rank_step import RankStep
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import machine_by_name

# Forks of Megatron-LM from before fused attention: SC 2021, and the zero bubble fork of 2023.
_BEFORE_FUSED_ATTENTION = ("2104.04473", "2401.10241")
# Megatron-Bridge's performance recipes reduce gradients in bfloat16 (no grad_reduce_in_fp32).
_HALF_GRADIENTS = ("performance-summary",)
# Its recipes take the fused cross entropy of Transformer Engine.
_FUSED_LOSS = ("Megatron-Bridge",)
# Microbatches in flight with vocabulary layers on all stages, of arXiv 2411.05288, section 5.
_MORE_IN_FLIGHT = {"vocab-1": 2, "vocab-2": 1}
_INTERLACED = 1.5


@dataclass(frozen=True)
class Run:
    """A published run, priced by the cluster backend.

    Attributes:
        row: What was published.
        model: Its layers.
        machine: Where it ran.
        chunks: What every stage held.
        published_s: Measured seconds of a step, if any.
    """

    row: GpuRow
    model: CapturedLayers
    machine: Machine
    chunks: tuple[Chunk, ...]
    published_s: float | None

    @cached_property
    def pricer(self) -> RankPricer:
        """Prices of this run's blocks."""
        source, raw = str(self.row.raw["source"]), self.row.raw
        engine = replace(
            MEGATRON,
            fused_attention=not any(name in source for name in _BEFORE_FUSED_ATTENTION),
            precision="" if self.row.precision == "bfloat16" else self.row.precision,
            fused_loss=any(name in source for name in _FUSED_LOSS),
            gradient_bytes=2 if any(name in source for name in _HALF_GRADIENTS) else 4,
            dropout=bool(re.match(r"gpt [\d.]+b", str(raw.get("model")).lower())),
        )
        return RankPricer(self.model.graph, self.machine, self.row.sizes, engine)

    @cached_property
    def step(self) -> RankStep:
        """The pipeline."""
        split, note = (str(self.row.raw.get(key) or "").lower() for key in ("split", "note"))
        more, factor = 0.0, 1.0
        if "all stages" in split:
            more = next((n for name, n in _MORE_IN_FLIGHT.items() if name in note), 0)
            factor = _INTERLACED if "interlaced" in note else 1.0
        return RankStep(
            self.pricer, self.stages, self.row.schedule, self.row.microbatches, more, factor
        )

    @cached_property
    def stages(self) -> tuple[RankBlock, ...]:
        """Every stage as one block."""
        price, model = self.pricer.block, self.model
        first = [in_stage(b, price(b)) for b in model.blocks("embedding", "other")]
        last = [in_stage(b, price(b)) for b in model.blocks("head", "loss")]
        dense, layer = price(model.layer(0)), price(model.layer(model.num_layers))
        found, done = [], 0
        for chunk in self.chunks:
            of_dense = max(0, min(chunk.layers, model.dense_layers - done))
            done += chunk.layers
            heads = chunk.head * (1 + chunk.extra)
            found.append(
                total_of(
                    [
                        (dense, of_dense),
                        (layer, chunk.layers - of_dense + chunk.extra),
                        *((block, chunk.embedding) for block in first),
                        *((block, heads) for block in last),
                    ]
                )
            )
        return tuple(found)

    def step_s(self) -> float:
        """Return the predicted seconds of a step."""
        return self.step.step_s()

    def memory_bytes(self) -> float:
        """Return the predicted peak of the rank that was measured."""
        found = self.step.memory_bytes()
        return found[-1] if "last" in str(self.row.raw.get("memory_of")) else max(found)

    def on(self, machine: Machine) -> Run:
        """Return the same run on a machine with other constants."""
        return Run(self.row, self.model, machine, self.chunks, self.published_s)


def read_run(raw: Raw) -> Run:
    """Return a published run, ready to be priced.

    Raises:
        UnjudgedRowError: It does not say what a price needs.
    """
    row = read_row(raw)
    model = captured_layers(row)
    layer = model.layer(model.num_layers).forward_flops
    head = sum(block.forward_flops for block in model.blocks("head"))
    chunks = chunks_of(row, model.num_layers, head / layer, model.extra_layers)
    split = str(raw.get("split") or "")
    if "|" in split and chunks != parse_layout(split):
        taken = f"its layout is of another model or number of stages: {len(chunks)} even ones"
        row = replace(row, assumptions=(*row.assumptions, taken))
    try:
        published = measured_s(row, model.num_layers)
    except UnjudgedRowError:
        if row.memory_bytes is None:
            raise
        published = None
    return Run(row, model, machine_by_name(row.machine), chunks, published)
