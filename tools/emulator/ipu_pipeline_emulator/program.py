"""The recorded program: blocks in the order in which they ran, and what each of them used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .graph import Graph


@dataclass
class SerializedMatMul:
    """One matrix product computed in slices.

    Attributes:
        mode: Name of the axis that is cut.
        factor: Number of slices.
        lhs: Shape of the left operand.
        rhs: Shape of the right operand.
    """

    mode: str
    factor: int
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]


@dataclass
class BlockRecord:
    """One run of a block: from its start to the start of the next.

    Attributes:
        id: Name; ``""`` for the operations before the first block.
        stage: Pipeline stage as assigned, before stages are merged.
        ipu: IPU within one replica.
        num_ops: Operations that produced a tensor.
        parameters: Names of parameters used, in order.
        buffers: Names of buffers used, in order.
        checkpoints: Tensors that were checkpointed.
        serialized: Matrix products computed in slices.
        losses: Names of loss functions called.
        attributes: ``poptorch.Attribute`` values seen, as ``(group, key, value)``.
    """

    id: str
    stage: int
    ipu: int
    num_ops: int = 0
    parameters: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    checkpoints: int = 0
    serialized: list[SerializedMatMul] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class Program:
    """Everything that a trace of the model saw.

    Attributes:
        training: Compiled for training.
        pipelined: Compiled for pipelined execution.
        blocks: Blocks in the order of execution.
        custom_ops: Names of custom operations; the stand-in computes zeros for them.
        overlapped: Copies of inputs or outputs overlap with compute.
        overlaps: ``input`` or ``output`` and the slot of every tensor that an overlap was set for.
        trained: Names of the parameters that get a gradient.
        replication_factor: Replicas of this process.
        num_ipus: IPUs reserved for all replicas; set by the checks.
        recomputation: PopART's ``autoRecomputation``, with its default filled in.
        graph: The operations.
    """

    training: bool
    pipelined: bool
    blocks: list[BlockRecord] = field(default_factory=list)
    custom_ops: list[str] = field(default_factory=list)
    overlapped: bool = False
    overlaps: list[tuple[str, int | None]] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    replication_factor: int = 1
    num_ipus: int = 0
    recomputation: int = 0
    graph: Graph = field(default_factory=Graph, repr=False)

    @property
    def recomputed_stages(self) -> list[int]:
        """Forward stages that run again before their backward pass.

        With ``Pipeline`` (3) that is every stage but the last, checkpoints or not.
        """
        stages = sorted({block.stage for block in self.blocks if block.id or block.num_ops})
        return stages[:-1] if self.recomputation == 3 else []

    @property
    def ipu_changes(self) -> int:
        """Changes of IPU along execution, starting from IPU 0."""
        changes, last = 0, 0
        for block in self.blocks:
            changes += block.ipu != last
            last = block.ipu
        return changes

    @property
    def num_forward_stages(self) -> int:
        """Forward stages, with neighbours on one IPU merged."""
        return self.ipu_changes + 1

    @property
    def num_stages(self) -> int:
        """Pipeline stages: forward and, in training, backward."""
        forward = self.num_forward_stages
        return 2 * forward - 1 if self.training else forward

    @property
    def used_ipus(self) -> list[int]:
        """IPUs of one replica that run something."""
        return sorted({block.ipu for block in self.blocks if block.num_ops or block.id})

    def ipus_of_variables(self) -> dict[str, list[int]]:
        """Return, for every parameter and buffer, the IPUs that use it."""
        return self._where(lambda block: block.ipu)

    def stages_of_variables(self) -> dict[str, list[int]]:
        """Return, for every parameter and buffer, the stages that use it."""
        return self._where(lambda block: block.stage)

    def _where(self, place: Any) -> dict[str, list[int]]:
        found: dict[str, set[int]] = {}
        for block in self.blocks:
            for name in [*block.parameters, *block.buffers]:
                found.setdefault(name, set()).add(place(block))
        return {name: sorted(places) for name, places in found.items()}

    def describe(self) -> str:
        """Return one line for each block."""
        lines = [
            f"{block.id or '(before the first block)'}: stage {block.stage}, IPU {block.ipu}, "
            f"{block.num_ops} operations, {len(block.parameters)} parameters, "
            f"{block.checkpoints} checkpoints, {len(block.serialized)} serialized products"
            for block in self.blocks
        ]
        return "\n".join(lines)
