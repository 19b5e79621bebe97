"""Step times against a walk through the pipeline, cycle by cycle."""

from __future__ import annotations

import random

import pytest

from ipu_pipeline.planner.schedules.objective import StagePrice
from ipu_pipeline.planner.search.objective import in_flight, least_microbatches, make_objective
from tests.planner.search.partition_oracle import kept_microbatches, step_seconds


def price(forward, backward):
    return StagePrice(forward, backward, 0.0, 0.0, 0.0, 0.0, ())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "popart", "maxload"])
def test_rows_equal_the_walk(schedule, training):
    rng = random.Random(7)
    for _ in range(200):
        depth = rng.randint(1, 5)
        count = least_microbatches(schedule, depth, training=training) + rng.randint(0, 6)
        devices = [rng.randrange(4) for _ in range(depth)]
        forward = [rng.randint(0, 9) for _ in range(depth)]
        backward = [rng.randint(0, 9) if training else 0 for _ in range(depth)]
        objective = make_objective(schedule, depth, count, devices, training=training)
        prices = [price(f, b) for f, b in zip(forward, backward, strict=True)]
        walked = step_seconds(schedule, count, devices, forward, backward, training=training)
        assert objective.seconds(devices, prices) == pytest.approx(walked)


def test_balanced_stages_give_the_published_bubble():
    # Note's example in POPART_PIPELINE.md: F=3, G=5 takes 7 (f+b); 1F1B and GPipe take the same.
    prices = [price(1.0, 2.0)] * 3
    for schedule in ("popart", "1f1b", "gpipe"):
        objective = make_objective(schedule, 3, 5)
        assert objective.seconds([0, 1, 2], prices) == pytest.approx(7 * 3.0)


def test_head_back_on_the_first_device_adds_up():
    prices = [price(1, 1), price(4, 4), price(4, 4), price(2, 2)]
    objective = make_objective("maxload", 4, 1)
    assert objective.seconds([0, 1, 2, 0], prices) == 8
    assert objective.seconds([0, 1, 0, 0], prices) == 14


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "popart", "maxload"])
def test_microbatches_in_flight(schedule):
    for training in (True, False):
        for stage in range(4):
            assert in_flight(schedule, 4 - stage, 5, training=training) == kept_microbatches(
                schedule, stage, 4, 5, training=training
            )


def test_popart_needs_enough_microbatches():
    with pytest.raises(ValueError, match="3 stages as 5 pipeline stages and needs at least 5"):
        make_objective("popart", 3, 4)
