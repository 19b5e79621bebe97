"""The answer: which blocks run where, how, what it costs, and how good that is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ipu_pipeline.planner.options.model import BlockChoice


@dataclass(frozen=True)
class StageAssignment:
    """One stage of a split. Seconds are for one microbatch on the stage's device.

    Attributes:
        index: Position in the pipeline.
        device: Position of its device in the machine.
        blocks: Its blocks, in execution order.
        choices: How each block runs, in the order of ``blocks``.
        forward_s: Compute of the forward pass.
        backward_s: Compute of the backward pass, recomputation included.
        transfer_s: Transfers over both boundaries, forward and backward.
        memory_bytes: Bytes it holds; parameters that another stage of the same memory also
            uses are counted in each, but once in the check of that memory.
        in_flight: Microbatches whose activations it holds at the same time.
        weight_bytes: The part of ``memory_bytes`` that never changes.
        stash_bytes: The part that it holds for each microbatch in flight; what is left of
            ``memory_bytes`` is needed only while a block runs.
    """

    index: int
    device: int
    blocks: tuple[str, ...]
    choices: tuple[BlockChoice, ...]
    forward_s: float
    backward_s: float
    transfer_s: float
    memory_bytes: int
    in_flight: int
    weight_bytes: int = 0
    stash_bytes: int = 0

    @property
    def load_s(self) -> float:
        """Seconds that one microbatch occupies the device."""
        return self.forward_s + self.backward_s + self.transfer_s

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Blocks whose forward pass is run again in the backward pass."""
        return tuple(
            name for name, way in zip(self.blocks, self.choices, strict=True) if way.recompute
        )

    @property
    def serialized(self) -> dict[str, int]:
        """Blocks that run in slices, with the number of slices."""
        return {
            name: way.serialize_factor
            for name, way in zip(self.blocks, self.choices, strict=True)
            if way.serialize_factor > 1
        }


@dataclass(frozen=True)
class Partition:
    """A split with its price and the proof of its quality.

    Attributes:
        stages: In pipeline order.
        objective: Seconds per optimizer step.
        lower_bound: No allowed split is quicker than this, in seconds per optimizer step.
        binding: What limits it: the stage that paces the pipeline, and a memory that forced
            recomputation or serialization, if any.
        schedule: Schedule the times are for.
        num_microbatches: Microbatches per step of one pipeline.
        replicas: Copies of the pipeline, each with its own devices.
    """

    stages: tuple[StageAssignment, ...]
    objective: float
    lower_bound: float
    binding: str
    schedule: str
    num_microbatches: int
    replicas: int = 1

    @property
    def gap(self) -> float:
        """Relative distance to the bound: 0.0 when the split is proven optimal."""
        if self.objective <= self.lower_bound:
            return 0.0
        return (self.objective - self.lower_bound) / self.objective

    @property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """Blocks of every stage."""
        return tuple(stage.blocks for stage in self.stages)

    @property
    def devices(self) -> tuple[int, ...]:
        """Device of every stage."""
        return tuple(stage.device for stage in self.stages)

    def with_bound(self, lower_bound: float) -> Partition:
        """Return this split with another proven bound (never above its own price)."""
        return replace(self, lower_bound=min(lower_bound, self.objective))
