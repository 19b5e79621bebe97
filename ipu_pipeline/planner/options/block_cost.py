"""What a cost model gives to the solver: for every block its possible ways to run, priced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.machine import Machine


@dataclass(frozen=True)
class BlockChoice:
    """One way to run a block, for ONE microbatch, on a device of speed 1.

    Attributes:
        forward_s: Seconds of the forward pass.
        backward_s: Seconds of the backward pass, including a recomputed forward.
        stash_bytes: Bytes kept for each microbatch in flight, besides the tensors that enter the
            block's stage (those are counted once for the stage).
        workspace_bytes: Bytes needed only while the block runs; a stage needs the largest.
        recompute: Whether the forward pass is run again in the backward pass.
        serialize_factor: In how many slices its table lookup or projection runs; 1 is whole.
        fixed_bytes: Bytes held all the time because of this choice.
    """

    forward_s: float
    backward_s: float = 0.0
    stash_bytes: float = 0
    workspace_bytes: float = 0
    recompute: bool = False
    serialize_factor: int = 1
    fixed_bytes: float = 0

    @property
    def total_s(self) -> float:
        """Seconds of forward and backward together."""
        return self.forward_s + self.backward_s

    def held_bytes(self, in_flight: int) -> float:
        """Bytes held with ``in_flight`` microbatches, without the workspace."""
        return in_flight * self.stash_bytes + self.fixed_bytes


@dataclass(frozen=True)
class BlockCost:
    """The price of one block on the machine's first device.

    Attributes:
        choices: At least one way to run it; the first is the plain one.
        weight_bytes: Parameters by first name: bytes of weights, gradients and optimizer state
            that a device holds when it runs this block. A parameter shared by several blocks of
            one device is held once, which is why this is a map.
    """

    choices: tuple[BlockChoice, ...]
    weight_bytes: Mapping[str, int]

    @property
    def plain(self) -> BlockChoice:
        """The way without recomputation and serialization."""
        return self.choices[0]


@dataclass(frozen=True)
class VocabularyChunks:
    """Equal parts of a vocabulary's rows, as blocks that any stage with other blocks may take.

    Attributes:
        names: The blocks, in the order of the rows; nothing else depends on them.
        entry_s: Seconds a microbatch of a stage with any of them, besides theirs.
    """

    names: tuple[str, ...]
    entry_s: float


@dataclass(frozen=True)
class GraphCosts:
    """Prices of every block of a graph on one machine.

    Attributes:
        blocks: By block name.
        source: ``analytic`` or ``profiled``: where the numbers come from.
        device_speed: Relative speed of each device of the machine (1.0 is the first device):
            a block on device d takes ``time / device_speed[d]``.
        together: Groups of blocks that were priced as one: the first carries the bytes of all of
            them, so they must be in one stage.
        frees_in_order: A block's stash goes as soon as it has run backward, so the workspace of
            an early block never meets the stash of later ones.
        update_s: Seconds per optimizer step of every block's update; blocks left out have none.
        ranks: Where several devices share a stage, the ranks of the pipelines as the search sees
            them: one device each, links as fast as for a rank's share of what crosses (tensors with
            gradients). Blocks then keep what enters them, and ``update_s`` is all that comes once
            per step.
        message_overlap: Share of the messages of a spread vocabulary that runs beside passes, as
            collectives; 0: the last stage asks the others one by one.
        chunks: Parts of a vocabulary that is to be spread, whose costs are among ``blocks``.
    """

    blocks: Mapping[str, BlockCost]
    source: str
    device_speed: tuple[float, ...] = ()
    together: tuple[tuple[str, ...], ...] = ()
    frees_in_order: bool = False
    update_s: Mapping[str, float] = field(default_factory=dict)
    ranks: Machine | None = None
    message_overlap: float = 0.0
    chunks: VocabularyChunks | None = None

    def speed(self, device: int) -> float:
        """Relative speed of ``device``; 1.0 where nothing else was said."""
        return self.device_speed[device] if device < len(self.device_speed) else 1.0


# Bytes per element of optimizer state: AdamW in float32.
_STATE_BYTES = 8.0


def weight_bytes(graph: BlockGraph, block: Block) -> Mapping[str, int]:
    """Return bytes of weight, gradient and optimizer state by parameter, for one block."""
    result = {}
    for fqn in block.parameters:
        parameter = graph.parameter_by_fqn[fqn]
        total = float(parameter.num_bytes)
        if parameter.trainable and graph.training:
            total += parameter.num_bytes + parameter.numel * _STATE_BYTES
        result[fqn] = int(total)
    return result


def gradient_bytes(graph: BlockGraph, block: Block) -> int:
    """Return the bytes of the gradients that one microbatch of ``block`` adds to those before."""
    if not graph.training:
        return 0
    parameters = (graph.parameter_by_fqn[fqn] for fqn in block.parameters)
    return sum(parameter.num_bytes for parameter in parameters if parameter.trainable)
