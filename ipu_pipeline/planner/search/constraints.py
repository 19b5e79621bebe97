"""What the caller fixes about a split. Everything left at its default is the solver's to choose.

``layers_per_ipu`` counts blocks of kind ``layer``, with wildcards as optimum-graphcore expands
them (its ``modeling_utils.py``). Embeddings before the first layer stay on the first device, also
when it has no layer (``[0, 4, 4, 4]``), heads and losses behind the last one on the last stage.
Where a device has several stages, its layers are in the first of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ipu_pipeline.errors import ConfigError, PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import check_count, check_counts, count_of
from ipu_pipeline.ir.select import select
from ipu_pipeline.planner.layers_per_ipu import WILDCARD, expand_layers
from ipu_pipeline.planner.schedules import schedule_kind

TiedPolicy = Literal["same_device", "exchange", "free"]
_TIED: tuple[TiedPolicy, ...] = ("same_device", "exchange", "free")


@dataclass(frozen=True)
class Constraints:
    """Limits on the split and the numbers of the run it is for.

    Attributes:
        num_stages: Pipeline depth; ``None`` finds the best depth up to the devices there are.
        num_microbatches: Microbatches per optimizer step of one pipeline (one replica).
        schedule: Name of a schedule, such as ``1f1b``.
        execution_order: Only split the order in which the model executes (poptorch needs it).
        stage_devices: Device of every stage, when given; stages may share a device.
        tied: Blocks that share a parameter: on the ``same_device``; anywhere, with a gradient
            ``exchange`` per step; or ``free`` (shared memory).
        same_device: More groups of blocks that must be on one device.
        pinned_stages: Block to the stage it must be in.
        pinned_devices: Block to the device it must be on.
        layers_per_ipu: Layers on each device, with -1 for "the rest" (``layers_per_ipu.py``).
        forbidden_cuts: Blocks that stay in the stage of the block executed before them.
        recompute: Whether blocks may, may never or must recompute where they can; or names,
            prefixes and patterns of the blocks that must, where they can, while others may not.
        allow_serialize: Whether blocks may be serialized.
        serialize: Slices by name, prefix or pattern of blocks (0 and 1: whole); the last pattern
            that means a block counts. Blocks that no pattern means are the solver's to choose.
        replicas: Copies of the pipeline, each with its own devices.
        max_stages: Deepest pipeline; ``None``: as deep as there are devices.
        update_s: Block to the seconds its optimizer update takes once per step.
        first_split: Blocks of every stage of a known split: a local search starts there, too.
        time_limit_s: Stop proving after this many seconds; the gap says what is left open.
        vocabulary: Whether blocks of the vocabulary are whole (``None``), spread over the stages
            ``even`` or by the share of every stage, or the one that is faster (``auto``).
        max_ideals: Largest number of boundaries searched; beyond it only the execution order
            is split, and the bound stays one over every order.
    """

    num_stages: int | None = None
    num_microbatches: int = 1
    schedule: str = "1f1b"
    execution_order: bool = False
    stage_devices: tuple[int, ...] | None = None
    tied: TiedPolicy = "free"
    same_device: tuple[tuple[str, ...], ...] = ()
    pinned_stages: Mapping[str, int] = field(default_factory=dict, hash=False)
    pinned_devices: Mapping[str, int] = field(default_factory=dict, hash=False)
    layers_per_ipu: tuple[int, ...] | None = None
    forbidden_cuts: tuple[str, ...] = ()
    recompute: Literal["auto", "never", "always"] | tuple[str, ...] = "auto"
    allow_serialize: bool = True
    serialize: Mapping[str, int] = field(default_factory=dict, hash=False)
    replicas: int = 1
    max_stages: int | None = None
    update_s: Mapping[str, float] = field(default_factory=dict, hash=False)
    first_split: tuple[tuple[str, ...], ...] = ()
    time_limit_s: float | None = None
    vocabulary: Literal["auto", "even"] | Sequence[float] | None = None
    max_ideals: int = 200_000

    def __post_init__(self) -> None:
        self._check_names()
        self._check_counts()
        if self.stage_devices is not None and self.num_stages not in (
            None,
            len(self.stage_devices),
        ):
            raise ValueError(
                f"stage_devices gives {count_of(len(self.stage_devices), 'stage')}, num_stages "
                f"says {self.num_stages}; leave num_stages out"
            )

    def with_stages(self, stages: Sequence[Sequence[str]]) -> Constraints:
        """Return these limits with every block in the given stage: a split chosen elsewhere."""
        return replace(
            self,
            num_stages=len(stages),
            pinned_stages={name: n for n, stage in enumerate(stages) for name in stage},
        )

    def factors(self, names: Iterable[str]) -> dict[str, int]:
        """Return the slices that ``serialize`` asks for, by block; 1 is whole."""
        known = tuple(names)
        return {
            name: max(1, factor)
            for pattern, factor in self.serialize.items()
            for name in select(pattern, known)
        }

    def kept(self) -> dict[str, Any]:
        """Return what the price of a plan depends on and a plan does not say, as JSON data."""
        given: dict[str, Any] = {} if self.tied == "free" else {"tied": self.tied}
        return {**given, "update_s": dict(self.update_s)} if self.update_s else given

    def _check_names(self) -> None:
        schedule_kind(self.schedule)
        if self.tied not in _TIED:
            raise ValueError(f"unknown tied policy {self.tied!r}; use one of {_TIED}")
        named = isinstance(self.recompute, tuple)
        if not named and self.recompute not in ("auto", "never", "always"):
            raise ValueError(
                "recompute must be 'auto', 'never' or 'always', or a tuple of block names, got "
                f"{self.recompute!r}"
            )

    def _check_counts(self) -> None:
        counts = {
            "num_stages": "num_stages",
            "num_microbatches": "num_microbatches",
            "replicas": "replicas",
            "max_stages": "num_devices",
            "max_ideals": "max_ideals",
        }
        check_counts(self, counts)
        for pattern, factor in self.serialize.items():
            check_count(f"serialize: slices of {pattern}", factor, "slices", least=0)
        for entry in self.layers_per_ipu or ():
            check_count("layers_per_ipu", entry, "num_layers", least=WILDCARD)
        if self.time_limit_s is not None and self.time_limit_s <= 0:
            raise ValueError(f"time_limit_s must be above 0, got {self.time_limit_s}")


@dataclass(frozen=True)
class LayerRule:
    """What each boundary must have behind it.

    Attributes:
        layers: Mask of the layer blocks.
        counts: Layers done after each stage.
        first: Mask of the blocks that belong to the first stage.
        last: Mask of the blocks that belong to the last stage.
    """

    layers: int
    counts: tuple[int, ...]
    first: int
    last: int

    def allows(self, mask: int, stages_done: int) -> bool:
        """Whether ``mask`` may be the set of blocks done after ``stages_done`` stages."""
        if stages_done == 0 or stages_done == len(self.counts):
            return True
        return (
            (mask & self.layers).bit_count() == self.counts[stages_done - 1]
            and mask & self.first == self.first
            and not mask & self.last
        )


def layer_rule(
    graph: BlockGraph, layers_per_ipu: Sequence[int], stage_devices: Sequence[int]
) -> LayerRule:
    """Turn ``layers_per_ipu`` into a rule for the boundaries between stages.

    Raises:
        PartitionError: They are not one entry per device, or do not add up to the model's layers.
    """
    layers = [i for i, block in enumerate(graph.blocks) if block.kind == "layer"]
    num_devices = max(stage_devices) + 1
    try:
        per_device = expand_layers(layers_per_ipu, num_devices, len(layers))
    except ConfigError as error:
        raise PartitionError(str(error)) from error
    counts, done, seen = [], 0, set()
    for device in stage_devices:
        done += 0 if device in seen else per_device[device]
        seen.add(device)
        counts.append(done)
    early = layers[0] if layers else 0
    late = layers[-1] if layers else len(graph.blocks)
    first = last = 0
    for index, block in enumerate(graph.blocks):
        if block.kind == "embedding" and index < early:
            first |= 1 << index
        if block.kind in ("head", "loss") and index > late:
            last |= 1 << index
    return LayerRule(sum(1 << i for i in layers), tuple(counts), first, last)
