"""Downward-closed sets of blocks: the boundaries a pipeline may have, and which are allowed.

A stage is the difference of two such sets. The lattice keeps them sorted by exact integer work, so
that the candidates for a stage of bounded load are a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.planner.search.constraints import LayerRule
from ipu_pipeline.planner.search.problem import Problem, Slot, bits

DEFAULT_LIMIT = 200_000
_WORK_RESOLUTION = 2**52


class TooManyIdeals(Exception):
    """The graph has more downward-closed sets than the limit."""


class Lattice:
    """Every downward-closed set that ``allowed`` accepts, sorted by work, smallest first.

    Attributes:
        masks: The sets; position 0 is empty and the last one holds every block.
        tops: Maximal elements of each set, as masks: S contains T iff it contains T's tops.
        work_units: Exact integer work of each set; ``work_s`` is the same in seconds.
    """

    def __init__(
        self,
        problem: Problem,
        allowed: Callable[[int], bool] | None = None,
        limit: int = DEFAULT_LIMIT,
    ) -> None:
        """Enumerate the sets of ``problem``.

        Raises:
            TooManyIdeals: There are more than ``limit``.
        """
        found = _enumerate(problem, limit)
        self._keep(problem, {m: found[m] for m in found if allowed is None or allowed(m)})

    @classmethod
    def of_masks(cls, problem: Problem, masks: Iterable[int]) -> Lattice:
        """Return the lattice of just these downward-closed sets; quick for growing ones."""
        units, _ = _work_units(problem)
        found, before, tops, work = {}, 0, 0, 0
        for mask in masks:
            if before & ~mask:
                before = tops = work = 0
            added = mask & ~before
            tops = _tops(problem, mask, tops | added)
            work += sum(units[block] for block in bits(added))
            found[mask], before = (tops, work), mask
        lattice = cls.__new__(cls)
        lattice._keep(problem, found)
        return lattice

    def _keep(self, problem: Problem, found: dict[int, tuple[int, int]]) -> None:
        self.problem = problem
        self.masks = sorted(found, key=lambda mask: (found[mask][1], mask.bit_count()))
        self.tops = [found[mask][0] for mask in self.masks]
        self.work_units = np.array([found[mask][1] for mask in self.masks], dtype=np.int64)
        self.unit_s = _work_units(problem)[1]
        self.work_s = self.work_units.astype(np.float64) * self.unit_s

    def __len__(self) -> int:
        """Number of sets kept."""
        return len(self.masks)

    @cached_property
    def position(self) -> dict[int, int]:
        """Position of every mask."""
        return {mask: position for position, mask in enumerate(self.masks)}

    @cached_property
    def member(self) -> NDArray[np.bool_]:
        """``member[b, i]``: block b is in set i."""
        num_bytes = (self.problem.num_blocks + 7) // 8
        raw = b"".join(mask.to_bytes(num_bytes, "little") for mask in self.masks)
        packed = np.frombuffer(raw, dtype=np.uint8).reshape(len(self.masks), num_bytes)
        unpacked = np.unpackbits(packed, axis=1, bitorder="little", count=self.problem.num_blocks)
        return np.ascontiguousarray(unpacked.T).astype(np.bool_)

    def total(self, amounts: tuple[float, ...] | list[float]) -> NDArray[np.float64]:
        """Sum of ``amounts`` (one per block) over each set."""
        return np.asarray(amounts, dtype=np.float64) @ self.member

    def supersets(self, position: int, low: int, high: int) -> NDArray[np.int64]:
        """Positions in ``[low, high)`` of the sets that contain set ``position``."""
        inside: NDArray[np.bool_] | None = None
        for block in bits(self.tops[position]):
            row = self.member[block, low:high]
            inside = row if inside is None else inside & row
        if inside is None:
            return np.arange(low, high)
        return low + np.flatnonzero(inside)


def _work_units(problem: Problem) -> tuple[list[int], float]:
    """Least work of each block in integer units, and the seconds of one unit."""
    seconds = [option.total_s for option in problem.fastest]
    unit_s = (sum(seconds) or 1.0) / _WORK_RESOLUTION
    return [round(value / unit_s) for value in seconds], unit_s


def _tops(problem: Problem, mask: int, among: int) -> int:
    """Blocks of ``among`` without a successor in ``mask``."""
    return sum(1 << block for block in bits(among) if not problem.succs[block] & mask)


def _enumerate(problem: Problem, limit: int) -> dict[int, tuple[int, int]]:
    """Map every downward-closed set to its tops and its work, growing block by block."""
    units, _ = _work_units(problem)
    preds, succs = problem.preds, problem.succs
    sources = sum(1 << block for block, mask in enumerate(preds) if not mask)
    found: dict[int, tuple[int, int]] = {0: (0, 0)}
    frontier: dict[int, int] = {0: sources}
    while frontier:
        grown: dict[int, int] = {}
        for mask, ready in frontier.items():
            tops, work = found[mask]
            for block in bits(ready):
                bit = 1 << block
                bigger = mask | bit
                if bigger in found:
                    continue
                found[bigger] = ((tops & ~preds[block]) | bit, work + units[block])
                opened = sum(1 << s for s in bits(succs[block]) if not preds[s] & ~bigger)
                grown[bigger] = (ready & ~bit) | opened
        if len(found) > limit:
            raise TooManyIdeals(f"more than {limit} downward-closed sets")
        frontier = grown
    return found


Bools = NDArray[np.bool_]


def boundaries(lattice: Lattice, slots: Sequence[Slot], rule: LayerRule | None) -> list[Bools]:
    """For 0..len(slots) stages done: which sets of ``lattice`` the pins and layers allow.

    None at all when a block may not be in any slot.
    """
    last = len(slots)
    allowed = [np.ones(len(lattice), dtype=np.bool_) for _ in range(last + 1)]
    allowed[0][1:] = False
    allowed[last][:-1] = False
    for block, first, final in _spans(slots):
        if final < 0:
            return [np.zeros(len(lattice), dtype=np.bool_) for _ in range(last + 1)]
        for done in range(1, last):
            if final < done:
                allowed[done] &= lattice.member[block]
            elif first >= done:
                allowed[done] &= ~lattice.member[block]
    if rule is not None:
        for done in range(1, last):
            allowed[done] &= _by_rule(lattice, rule, done)
    return allowed


def _spans(slots: Sequence[Slot]) -> Iterator[tuple[int, int, int]]:
    """``(block, first slot, last slot)`` of every block that may not be everywhere."""
    limited = 0
    for slot in slots:
        limited |= slot.forbidden
    for block in bits(limited):
        open_slots = [s for s, slot in enumerate(slots) if not slot.forbidden >> block & 1]
        yield block, open_slots[0] if open_slots else len(slots), max(open_slots, default=-1)


def _by_rule(lattice: Lattice, rule: LayerRule, done: int) -> Bools:
    member = lattice.member
    allowed: Bools = member[list(bits(rule.layers))].sum(axis=0) == rule.counts[done - 1]
    for block in bits(rule.first):
        allowed &= member[block]
    for block in bits(rule.last):
        allowed &= ~member[block]
    return allowed
