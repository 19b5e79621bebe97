"""The partitioning problem on integers: blocks are bit positions, sets of blocks are ``int`` masks.

Everything the solver does is written against :class:`Problem` and :class:`Slot`, so that a
captured model (``build.py``) and the public instance files (``benchmarks``) share one solver.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

from ipu_pipeline.ir.machine import Link


@dataclass(frozen=True)
class Option:
    """One way to run a block, for one microbatch on a device of speed 1.

    Attributes:
        forward_s: Seconds of the forward pass.
        backward_s: Seconds of the backward pass, a recomputed forward included.
        stash_bytes: Bytes for each microbatch in flight.
        workspace_bytes: Bytes needed only while the block runs; a stage needs the largest.
        fixed_bytes: Bytes held all the time because of this option.
    """

    forward_s: float
    backward_s: float = 0.0
    stash_bytes: float = 0
    workspace_bytes: float = 0
    fixed_bytes: float = 0

    @property
    def total_s(self) -> float:
        """Seconds of forward and backward together."""
        return self.forward_s + self.backward_s

    def held_bytes(self, in_flight: int) -> float:
        """Bytes held with ``in_flight`` microbatches, without the workspace."""
        return in_flight * self.stash_bytes + self.fixed_bytes


@dataclass(frozen=True)
class Value:
    """A tensor that one block makes and others read.

    Attributes:
        producer: The block that makes it.
        consumers: Mask of the blocks that read it.
        forward_bytes: Bytes sent in the forward pass of one microbatch.
        backward_bytes: Bytes of its gradient sent back; 0 without one.
    """

    producer: int
    consumers: int
    forward_bytes: float
    backward_bytes: float = 0


@dataclass(frozen=True)
class Shared:
    """Bytes that several blocks use and that one place holds once (a tied weight, an input).

    Attributes:
        num_bytes: Size.
        users: Mask of the blocks.
    """

    num_bytes: float
    users: int


@dataclass(frozen=True)
class Exchange:
    """Gradients of a tied parameter that the stages holding it add up once per step.

    Attributes:
        seconds: What it costs each stage that holds the parameter, if another one does too.
        users: Mask of the blocks that use the parameter.
    """

    seconds: float
    users: int


@dataclass(frozen=True)
class Problem:
    """Blocks, what they cost and what they exchange.

    Attributes:
        names: Block names, in execution order (which is a topological order).
        preds: Mask of the direct predecessors of every block.
        options: The ways to run every block; at least one each.
        values: Tensors between blocks.
        weight_bytes: Bytes of the parameters that only this block uses.
        shared_weights: Parameters used by several blocks; a memory holds each once.
        inputs: Model inputs; a stage that reads one holds it once per microbatch in flight.
        outer_s: Seconds per optimizer step (update, gradient all-reduce) that a block adds.
        exchanges: Gradient exchanges between stages that hold the same parameter.
        together: Masks of blocks that must be in one stage.
        same_device: Masks of blocks whose stages must be on one device.
        relay: A value passes through every stage between producer and consumer, and costs on
            each hop; otherwise it goes straight to the stages that read it.
        host_s: Seconds per block on a host core (max-load instances), or ``None``.
        host_only: Mask of the blocks that accelerators cannot run.
    """

    names: tuple[str, ...]
    preds: tuple[int, ...]
    options: tuple[tuple[Option, ...], ...]
    values: tuple[Value, ...] = ()
    weight_bytes: tuple[float, ...] = ()
    shared_weights: tuple[Shared, ...] = ()
    inputs: tuple[Shared, ...] = ()
    outer_s: tuple[float, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    together: tuple[int, ...] = ()
    same_device: tuple[int, ...] = ()
    relay: bool = True
    host_s: tuple[float, ...] | None = None
    host_only: int = 0

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.names)

    @property
    def everything(self) -> int:
        """Mask of all blocks."""
        return (1 << self.num_blocks) - 1

    @cached_property
    def succs(self) -> tuple[int, ...]:
        """Mask of the direct successors of every block."""
        result = [0] * self.num_blocks
        for block, mask in enumerate(self.preds):
            for pred in bits(mask):
                result[pred] |= 1 << block
        return tuple(result)

    @cached_property
    def fastest(self) -> tuple[Option, ...]:
        """The quickest option of every block (the smaller one of equals)."""
        return tuple(
            min(ways, key=lambda way: (way.total_s, way.stash_bytes + way.fixed_bytes))
            for ways in self.options
        )

    @cached_property
    def held(self) -> tuple[float, ...]:
        """Private weight bytes of every block."""
        return self.weight_bytes or (0.0,) * self.num_blocks

    @cached_property
    def outer(self) -> tuple[float, ...]:
        """Seconds per optimizer step of every block."""
        return self.outer_s or (0.0,) * self.num_blocks

    def names_of(self, mask: int) -> tuple[str, ...]:
        """Names of the blocks in ``mask``, in execution order."""
        return tuple(self.names[block] for block in bits(mask))


@dataclass(frozen=True)
class Slot:
    """One position of the pipeline: what a stage put there gets.

    Attributes:
        device: Device that runs it; slots with equal devices add up their loads.
        pool: Memory it uses; slots with equal pools add up their bytes.
        capacity: Bytes of that memory.
        speed: Times are divided by this.
        in_flight: Microbatches whose activations it keeps.
        link_in: Link from the slot before; ``None`` costs nothing.
        link_out: Link to the slot behind; ``None`` costs nothing.
        forbidden: Mask of the blocks that may not be here.
        host: A host core: times are ``Problem.host_s``, transfers and memory are free.
        index: Its number in the pipeline.
        num_stages: Stages of the pipeline.
    """

    device: int
    pool: int
    capacity: float = inf
    speed: float = 1.0
    in_flight: int = 1
    link_in: Link | None = None
    link_out: Link | None = None
    forbidden: int = 0
    host: bool = False
    index: int = 0
    num_stages: int = 1


def bits(mask: int) -> Iterator[int]:
    """Yield the positions of the ones in ``mask``, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def mask_of(blocks: Iterable[int]) -> int:
    """Return the mask with ones at ``blocks``."""
    mask = 0
    for block in blocks:
        mask |= 1 << block
    return mask


def closure(preds: Sequence[int]) -> list[int]:
    """Mask of all predecessors of every block, direct or not (blocks in topological order)."""
    found: list[int] = []
    for mask in preds:
        for pred in bits(mask):
            mask |= found[pred]
        found.append(mask)
    return found


@dataclass(frozen=True)
class Contraction:
    """A problem with fewer blocks and the same optimum.

    Attributes:
        problem: The smaller problem.
        members: Per block of it, the mask of the blocks that it stands for.
    """

    problem: Problem
    members: tuple[int, ...]

    def expanded(self, mask: int) -> int:
        """The blocks that the blocks in ``mask`` stand for."""
        return sum(self.members[block] for block in bits(mask))

    @classmethod
    def of(cls, problem: Problem, capacity: float) -> Contraction:
        """Merge blocks that take no time into a neighbour, where no split can lose by it.

        Block b may go to the stage of block x when x is neither before a predecessor of b nor
        behind a successor. Then only values at b that x has no part in can newly cross a boundary
        of that stage or of the one that b leaves; and those between b and x alone no longer do. So
        where the first cost no more than the second, some best split has b with x.

        Args:
            problem: Nothing is merged where values are relayed (``Problem.relay``).
            capacity: Memory of a stage; if not everything fits, blocks with bytes stay.
        """
        found = cls(problem, tuple(1 << block for block in range(problem.num_blocks)))
        ample = sum(problem.held) <= capacity and not problem.shared_weights
        while not problem.relay:
            pair = _mergeable(found.problem, ample=ample)
            if pair is None:
                break
            found = found._merged(*pair)
        return found

    def _merged(self, block: int, target: int) -> Contraction:
        old = self.problem
        preds = list(old.preds)
        preds[target] = (preds[target] | preds[block]) & ~(1 << target | 1 << block)
        for succ in bits(old.succs[block] & ~(1 << target)):
            preds[succ] |= 1 << target
        order = [b for b in _topological([m & ~(1 << block) for m in preds]) if b != block]
        number = {b: position for position, b in enumerate(order)}
        number[block] = number[target]

        def moved(mask: int) -> int:
            return mask_of({number[b] for b in bits(mask)})

        values = (
            replace(v, producer=number[v.producer],
                    consumers=moved(v.consumers) & ~(1 << number[v.producer]))
            for v in old.values
        )  # fmt: skip
        held = [*old.held]
        held[target] += held[block]
        members = [*self.members]
        members[target] |= members[block]
        return Contraction(
            replace(
                old,
                names=tuple(old.names[b] for b in order),
                preds=tuple(moved(preds[b] & ~(1 << block)) for b in order),
                options=tuple(old.options[b] for b in order),
                values=tuple(v for v in values if v.consumers),
                weight_bytes=tuple(held[b] for b in order),
                host_s=old.host_s and tuple(old.host_s[b] for b in order),
                host_only=moved(old.host_only),
            ),
            tuple(members[b] for b in order),
        )


def _topological(preds: Sequence[int]) -> list[int]:
    order, done, waiting = [], 0, list(range(len(preds)))
    while waiting:
        ready = [block for block in waiting if not preds[block] & ~done]
        order += ready
        done |= mask_of(ready)
        waiting = [block for block in waiting if not done >> block & 1]
    return order


def _mergeable(problem: Problem, *, ample: bool) -> tuple[int, int] | None:
    """A block that takes no time, and the block it may be merged into."""
    before = closure(problem.preds)
    ends: list[list[tuple[int, float]]] = [[] for _ in problem.names]
    for value in problem.values:
        mask = value.consumers | 1 << value.producer
        for block in bits(mask):
            ends[block].append((mask, value.forward_bytes + value.backward_bytes))
    for block, ways in enumerate(problem.options):
        takes = ways[0].total_s or ways[0].held_bytes(1) or ways[0].workspace_bytes
        if len(ways) > 1 or takes or (problem.held[block] and not ample):
            continue
        if (problem.host_s and problem.host_s[block]) or problem.host_only >> block & 1:
            continue
        for target in bits(_between(problem, before, block)):
            alone = 1 << block | 1 << target
            saved = sum(cost for mask, cost in ends[block] if not mask & ~alone)
            added = sum(cost for mask, cost in ends[block] if not mask >> target & 1)
            if added <= saved:
                return block, target
    return None


def _between(problem: Problem, before: Sequence[int], block: int) -> int:
    """Blocks that may be in the same stage whatever the split: behind what ``block`` needs."""
    preds, succs = problem.preds[block], problem.succs[block]
    mask = problem.everything & ~(1 << block)
    for succ in bits(succs):
        mask &= before[succ] | 1 << succ
    return mask_of(x for x in bits(mask) if not preds & ~(before[x] | 1 << x))
