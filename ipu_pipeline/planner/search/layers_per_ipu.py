"""``layers_per_ipu``: a published list of layers per device, respected to the letter.

Counts are blocks of kind ``layer``. ``[-1]`` and ``-1`` entries share the rest evenly, and what
does not divide goes to the last of them, as optimum-graphcore does (its ``modeling_utils.py``).
Embeddings that run before the first layer stay on the first device, also when it has no layer
(``[0, 4, 4, 4]``); heads and losses that run after the last layer stay on the last stage. Where a
device has several stages, its layers are in the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ipu_pipeline.backends.ipu.config.layers import WILDCARD, expand_layers
from ipu_pipeline.errors import ConfigError, PartitionError
from ipu_pipeline.ir.graph import BlockGraph


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

    def describe(self, mask: int, stages_done: int) -> str:
        """What the rule asks for and what ``mask`` has, for a message."""
        return (
            f"{self.counts[stages_done - 1]} layers must be done here, "
            f"{(mask & self.layers).bit_count()} are; embeddings belong to the first stage, heads "
            "and losses to the last"
        )


def expand_layers_per_ipu(
    layers_per_ipu: Sequence[int], num_layers: int, num_devices: int
) -> tuple[int, ...]:
    """Replace the wildcards of ``layers_per_ipu``.

    Raises:
        PartitionError: An entry is below -1, the length is not ``num_devices``, or the sum is
            not ``num_layers``.
    """
    if not layers_per_ipu or any(count < WILDCARD for count in layers_per_ipu):
        raise PartitionError(
            f"layers_per_ipu={list(layers_per_ipu)} must hold counts of 0 or more, or -1 for the "
            "rest"
        )
    try:
        return expand_layers(layers_per_ipu, num_devices, num_layers)
    except ConfigError as error:
        raise PartitionError(str(error)) from error


def layer_rule(
    graph: BlockGraph, layers_per_ipu: Sequence[int], stage_devices: Sequence[int]
) -> LayerRule:
    """Turn ``layers_per_ipu`` into a rule for the boundaries between stages."""
    layers = [i for i, block in enumerate(graph.blocks) if block.kind == "layer"]
    num_devices = max(stage_devices) + 1
    per_device = expand_layers_per_ipu(layers_per_ipu, len(layers), num_devices)
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
