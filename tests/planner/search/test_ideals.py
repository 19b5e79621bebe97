"""Downward-closed sets against their definition."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ipu_pipeline.planner.options.block_cost import BlockChoice
from ipu_pipeline.planner.search.ideals import Lattice, TooManyIdeals
from ipu_pipeline.planner.search.problem import Problem, bits


def random_problem(seed, count):
    rng = random.Random(seed)
    preds = tuple(sum(1 << p for p in range(b) if rng.random() < 0.3) for b in range(count))
    options = tuple((BlockChoice(rng.choice([0, 1, 2.5])),) for _ in range(count))
    return Problem(tuple(map(str, range(count))), preds, options)


@pytest.mark.parametrize("seed", range(30))
def test_lattice_holds_every_closed_set_once_and_in_order(seed):
    problem = random_problem(seed, 7)
    closed = {
        mask for mask in range(1 << 7) if all(problem.preds[b] & ~mask == 0 for b in bits(mask))
    }
    lattice = Lattice(problem)
    assert set(lattice.masks) == closed
    assert len(lattice) == len(closed)
    assert lattice.masks[0] == 0
    assert lattice.masks[-1] == problem.everything
    assert bool((np.diff(lattice.work_s) >= 0).all())
    for position, mask in enumerate(lattice.masks):
        found = {lattice.masks[i] for i in lattice.supersets(position, 0, len(lattice))}
        assert found == {other for other in closed if mask & ~other == 0}
        assert lattice.work_s[position] == pytest.approx(
            sum(problem.fastest[b].total_s for b in bits(mask))
        )


def test_of_masks_equals_the_filtered_lattice():
    problem = random_problem(3, 7)
    whole = Lattice(problem)
    part = Lattice.of_masks(problem, [*whole.masks[::2], problem.everything])
    assert set(part.masks) == set(whole.masks[::2]) | {problem.everything}
    assert [whole.tops[whole.masks.index(mask)] for mask in part.masks] == part.tops


def test_too_many_sets_are_refused():
    problem = Problem(tuple(map(str, range(12))), (0,) * 12, ((BlockChoice(1.0),),) * 12)
    with pytest.raises(TooManyIdeals, match="more than 1000 downward-closed sets"):
        Lattice(problem, limit=1000)
