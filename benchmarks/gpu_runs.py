"""A published GPU run as a pipeline of ranks: the model's layers, put together as it was split."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from benchmarks.gpu_attention import CoreAttentionPricer, DroppedTokensPricer
from benchmarks.gpu_models import CapturedLayers, captured_layers
from benchmarks.gpu_rows import (
    Chunk,
    GpuRow,
    Raw,
    UnjudgedRowError,
    chunks_of,
    chunks_of_layout,
    is_nothing,
    measured_s,
    read_row,
)
from benchmarks.gpu_step import PublishedStep, total_of
from ipu_pipeline.backends.cluster.prices.parallel_sizes import MEGATRON
from ipu_pipeline.backends.cluster.prices.rank import RankBlock, RankPricer
from ipu_pipeline.backends.cluster.prices.rank_plan import in_stage
from ipu_pipeline.ir.machine import Link, Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.planner.options.vocabulary_shares import VocabularyShares

# Forks of Megatron-LM from before fused attention: SC 2021, and the zero bubble fork of 2023.
_BEFORE_FUSED_ATTENTION = ("2104.04473", "2401.10241")
# Megatron-Bridge's performance recipes reduce gradients in bfloat16 (no grad_reduce_in_fp32).
_HALF_GRADIENTS = ("performance-summary",)
# Its recipes take the fused cross entropy of Transformer Engine.
_FUSED_LOSS = ("Megatron-Bridge",)
# Its MXFP8 recipes of these models, from this release on, run a step as one CUDA graph and the
# experts' all-to-all beside the other microbatch's products
# (perf_recipes: _enable_hybridep_full_iteration_mxfp8, overlap_moe_expert_parallel_comm).
_WHOLE_GRAPH_MODELS, _WHOLE_GRAPH_RELEASE = ("deepseek", "qwen3", "gpt oss"), "26.06"
# Runs whose experts take a fixed number of rows and drop the others.
_DROPS_TOKENS = "tokendrop"
# torchtitan prints what the allocator has reserved; it has FSDP's shards and buffers besides.
_RESERVED = {"torchtitan": 1.3}
# What a recipe that did not fit may have done besides, from the cheapest on. The recipes of hosts
# that are linked with their GPUs by NVLink offload activations before they recompute layers.
LATER_RECIPE = "it does not fit with a later commit's recipe"
UNSTATED_RECIPE = "its recomputation is not stated, and it does not fit without"
_CHEAPER = (("mla_up_proj",), ("mla_up_proj", "moe_act"))
_NEAR_HOSTS = ("gh200", "gb200", "gb300")
_OFFLOADED = 0.5
# Microbatches in flight with vocabulary layers on all stages, of arXiv 2411.05288, section 5.
_MORE_IN_FLIGHT = {"vocab-1": 2, "vocab-2": 1}
_INTERLACED = 1.5


def runs_as_one_graph(raw: Raw) -> bool:
    """Whether a row's recipe runs the whole step as one CUDA graph."""
    recipe, note = raw.get("recompute"), str(raw.get("note") or "")
    release = re.search(r"release (\d+\.\d+)", note)
    return (
        isinstance(recipe, Mapping)
        and "fp8mx" in str(recipe.get("from_recipe_at_head"))
        and bool(recipe.get("same_parallel_settings"))
        and release is not None
        and release[1] >= _WHOLE_GRAPH_RELEASE
        and any(name in str(raw.get("model")).lower() for name in _WHOLE_GRAPH_MODELS)
    )


@dataclass(frozen=True)
class Run:
    """A published run, priced by the cluster backend.

    Attributes:
        row: What was published.
        model: Its layers.
        machine: Where it ran.
        chunks: What every stage held.
        published_s: Measured seconds of a step, if any.
        on_device: Share of what is kept for backward passes that is not offloaded to the host.
    """

    row: GpuRow
    model: CapturedLayers
    machine: Machine
    chunks: tuple[Chunk, ...]
    published_s: float | None
    on_device: float = 1.0

    @cached_property
    def pricer(self) -> RankPricer:
        """Prices of this run's blocks."""
        source, raw = str(self.row.raw.get("source")), self.row.raw
        graph, drops = runs_as_one_graph(raw), _DROPS_TOKENS in str(raw.get("note"))
        engine = replace(
            MEGATRON,
            expert_overlap=1.0 if graph else 0.0 if drops else MEGATRON.expert_overlap,
            precision="" if self.row.precision == "bfloat16" else self.row.precision,
            fused_loss=any(name in source for name in _FUSED_LOSS),
            gradient_bytes=2 if any(name in source for name in _HALF_GRADIENTS) else 4,
            dropout=bool(re.match(r"gpt [\d.]+b", str(raw.get("model")).lower())),
        )
        old = any(name in source for name in _BEFORE_FUSED_ATTENTION)
        machine = without_host(self.machine) if graph else self.machine
        kind = CoreAttentionPricer if old else DroppedTokensPricer if drops else RankPricer
        return kind(self.model.graph, machine, self.row.sizes, engine)

    @cached_property
    def step(self) -> PublishedStep:
        """The pipeline."""
        split, note = (str(self.row.raw.get(key) or "").lower() for key in ("split", "note"))
        more, factor = 0.0, 1.0
        if "all stages" in split:
            more = next((n for name, n in _MORE_IN_FLIGHT.items() if name in note), 0)
            factor = _INTERLACED if "interlaced" in note else 1.0
        source = str(self.row.raw.get("source"))
        return PublishedStep.of(
            self.pricer,
            self.stages,
            self.row.schedule,
            self.row.microbatches,
            shares=self.shares,
            more_in_flight=more,
            in_flight_factor=factor * self.on_device,
            reserved_share=max([1.0, *(n for name, n in _RESERVED.items() if name in source)]),
        )

    @cached_property
    def shares(self) -> tuple[tuple[float, float], ...]:
        """Seconds of softmax and rows of every stage, where the vocabulary is spread over all."""
        depth = len(self.chunks)
        if any(chunk.head != 1 / depth for chunk in self.chunks) or depth == 1:
            return ()
        spread = VocabularyShares(self.model.graph)
        bounds = [round(spread.size * stage / depth) for stage in range(depth + 1)]
        graph, shares = spread.shared(list(pairwise(bounds)))
        pricer = replace(self.pricer, graph=graph)
        link = self.machine.link_between(0, len(self.machine.devices) - 1)
        kernels = self.machine.devices[0].kernels
        rate = 1.0 if kernels is None else kernels.link_share
        link = Link(link.bytes_per_s * rate, link.latency_s)
        # An interlaced pipeline waits for its messages.
        overlap = 0.0 if self._interlaced else pricer.engine.tensor_overlap
        messages = spread.message_s(link, overlap)
        blocks = [
            [[pricer.block(graph[name]) for name in names] for names in (one.softmax, one.rows)]
            for one in shares
        ]
        found = [
            [sum(block.forward_s + block.backward_s for block in part) for part in own]
            for own in blocks
        ]
        return tuple((s + messages[0], rows + messages[1]) for s, rows in found)

    @property
    def _interlaced(self) -> bool:
        return "interlaced" in str(self.row.raw.get("note") or "").lower()

    @cached_property
    def stages(self) -> tuple[RankBlock, ...]:
        """Every stage as one block; seconds of a vocabulary that is spread are apart."""
        price, model = self.pricer.block, self.model
        first = [in_stage(b, price(b)) for b in model.blocks("embedding", "other")]
        last = [in_stage(b, price(b)) for b in model.blocks("head", "loss")]
        if self.shares:
            first, last = ([_without_seconds(block) for block in own] for own in (first, last))
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
        return replace(self, machine=machine)

    def fits(self) -> bool:
        """Whether the predicted peak is within the memory of a GPU."""
        return self.memory_bytes() <= self.machine.devices[0].memory_bytes

    def fitting(self) -> Run:
        """Return a run whose recomputation was not published as one that fits, if there is one.

        A row that takes it from the recipe of a later commit, or says nothing of it, ran all the
        same: the cheapest that fits is taken, and said.
        """
        stated = self.row.raw.get("recompute")
        silent = stated is None or (is_nothing(stated) and stated != "none")
        if self.fits() or not (isinstance(stated, Mapping) or silent):
            return self
        tried = [self._with(parts, 1.0) for parts in _CHEAPER]
        if self.row.machine.startswith(_NEAR_HOSTS):
            tried.append(self._with((), _OFFLOADED))
        tried.append(self._with(("full",), 1.0))
        return next((run for run in tried if run.fits()), self)

    def _with(self, parts: tuple[str, ...], on_device: float) -> Run:
        what = " and ".join(parts) + " recomputed" if parts else "half of the activations offloaded"
        said = LATER_RECIPE if self.row.raw.get("recompute") else UNSTATED_RECIPE
        taken = (*self.row.assumptions, f"{said}: {what}")
        recompute = ("full",) if "full" in parts else (*self.row.sizes.recompute, *parts)
        sizes = replace(self.row.sizes, recompute=recompute)
        row = replace(self.row, sizes=sizes, assumptions=taken)
        return replace(self, row=row, on_device=on_device)


def _without_seconds(block: RankBlock) -> RankBlock:
    return replace(block, forward_s=0.0, backward_s=0.0)


def without_host(machine: Machine) -> Machine:
    """Return a machine on which no launch costs time and nothing waits for the host."""
    devices = [replace(one, op_overhead_s=0.0, host_sync_s=0.0) for one in machine.devices]
    return replace(machine, devices=tuple(devices))


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
    if "|" in split and chunks != chunks_of_layout(split):
        taken = f"its layout is of another model or number of stages: {len(chunks)} even ones"
        row = replace(row, assumptions=(*row.assumptions, taken))
    machine = machine_by_name(row.machine)
    try:
        peak = machine.devices[0].peak_flops_per_s("bfloat16")
        published = measured_s(row, step_flops(row, model), peak)
    except UnjudgedRowError:
        if row.memory_bytes is None:
            raise
        published = None
    return Run(row, model, machine, chunks, published).fitting()


def step_flops(row: GpuRow, model: CapturedLayers) -> float:
    """Return the FLOPs of a step that sources divide by the time.

    Source: Narayanan et al., SC 2021, equation 3: three forward passes of everything, with full
    recomputation four of the layers.
    """
    dense, rest = model.dense_layers, model.num_layers - model.dense_layers
    layers = dense * model.layer(0).forward_flops + rest * model.layer(dense).forward_flops
    head = sum(block.forward_flops for block in model.blocks("head"))
    passes = 4 if "full" in row.sizes.recompute else 3
    return row.microbatches * row.sizes.dp * (passes * layers + 3 * head)
