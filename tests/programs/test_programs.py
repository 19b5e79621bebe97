"""Programs composed of features: equal to plain torch, or an error of ours; never a third thing.

``make test`` tries the same 200 every time, ``make test-acceptance`` the other 300; with
``IPU_PIPELINE_PROGRAMS`` so many new ones are tried instead.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.programs.census import RARE, RIGHT, outcome
from tests.programs.program import FEATURES, Program

FEW = 500
NUMBER = int(os.environ.get("IPU_PIPELINE_PROGRAMS", FEW))
SHARDS, QUICK = 20, 8
# From here on, the quick shards together meet every value of every feature at least twice.
FIRST_SEED = 5


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Draw a program; of four one has a given feature."""
    chosen = {
        name: draw(st.sampled_from(values[1:])) if draw(st.integers(1, RARE)) == RARE else values[0]
        for name, values in FEATURES.items()
    }
    layers = draw(st.integers(2, 4))
    return Program(
        **chosen,
        layers=layers,
        stages=draw(st.integers(1, min(3, layers))),
        microbatches=draw(st.integers(1, 4)),
    )


@pytest.mark.parametrize(
    "shard",
    [
        *range(QUICK),
        *(pytest.param(n, marks=pytest.mark.acceptance) for n in range(QUICK, SHARDS)),
    ],
)
def test_a_program_is_equal_to_plain_torch_or_refused_by_name(shard: int) -> None:
    """The first program that is neither is shown, made as small as possible."""
    counts: Counter[str] = Counter()

    @seed(FIRST_SEED + shard if NUMBER == FEW else random.SystemRandom().randrange(2**32))
    @settings(max_examples=NUMBER // SHARDS, database=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def tried(program: Program) -> None:
        found = outcome(program)
        assert found in RIGHT, f"{program}: {found}"
        counts[found] += 1

    tried()
    assert counts["equal"] > counts["refused"], counts
