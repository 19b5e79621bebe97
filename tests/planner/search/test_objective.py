"""Step times against a walk through the pipeline, cycle by cycle."""

from __future__ import annotations

import random

import pytest

from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind
from ipu_pipeline.planner.schedules.objective import Objective, StagePrice
from tests.planner.search.partition_oracle import kept_microbatches, step_seconds


def price(forward, backward):
    return StagePrice(forward, backward, 0.0, 0.0, 0.0, 0.0, ())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "popart"])
def test_rows_equal_the_walk(schedule, training):
    rng = random.Random(7)
    for _ in range(200):
        depth = rng.randint(1, 5)
        kind = schedule_kind(schedule)
        least = kind.least_microbatches(PipelineShape.of(depth, 1, training=training))
        count = least + rng.randint(0, 6)
        devices = [rng.randrange(4) for _ in range(depth)]
        shape = PipelineShape.of(depth, count, devices, training=training)
        forward = [rng.randint(0, 9) for _ in range(depth)]
        backward = [rng.randint(0, 9) if training else 0 for _ in range(depth)]
        objective = kind.objective(shape)
        prices = [price(f, b) for f, b in zip(forward, backward, strict=True)]
        walked = step_seconds(schedule, count, devices, forward, backward, training=training)
        assert objective.seconds(devices, prices) == pytest.approx(walked)


def test_balanced_stages_give_the_published_bubble():
    # Note's example in POPART_PIPELINE.md: F=3, G=5 takes 7 (f+b); 1F1B and GPipe take the same.
    prices = [price(1.0, 2.0)] * 3
    for schedule in ("popart", "1f1b", "gpipe"):
        objective = schedule_kind(schedule).objective(PipelineShape.of(3, 5))
        assert objective.seconds([0, 1, 2], prices) == pytest.approx(7 * 3.0)


def test_head_back_on_the_first_device_adds_up():
    prices = [price(1, 1), price(4, 4), price(4, 4), price(2, 2)]
    objective = Objective.paced(1, 0, 4)
    assert objective.seconds([0, 1, 2, 0], prices) == 8
    assert objective.seconds([0, 1, 0, 0], prices) == 14


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "popart"])
def test_microbatches_in_flight(schedule):
    for training in (True, False):
        shape = PipelineShape.of(4, 5, training=training)
        kept = [kept_microbatches(schedule, s, 4, 5, training=training) for s in range(4)]
        assert list(schedule_kind(schedule).in_flight(shape)) == kept


def test_popart_needs_enough_microbatches():
    with pytest.raises(ValueError, match="3 stages as 5 pipeline stages and needs at least 5"):
        schedule_kind("popart").objective(PipelineShape.of(3, 4))
