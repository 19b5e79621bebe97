"""Which sets of done blocks are allowed after each stage: pins, given layers, device groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.planner.search.ideals import Lattice
from ipu_pipeline.planner.search.layers_per_ipu import LayerRule
from ipu_pipeline.planner.search.problem import Slot, bits

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
