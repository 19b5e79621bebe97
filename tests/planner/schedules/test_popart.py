"""PopART's schedule: cycles as in its design note, stash depth, merging, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipu_pipeline.ir.schedule import Action, Schedule, requirements
from ipu_pipeline.planner.schedules import PipelineShape
from ipu_pipeline.planner.schedules.kinds.popart import POPART, PipelineStages, cycles


def popart(stages, microbatches, devices=None, *, training=True) -> Schedule:
    return POPART.rows(PipelineShape.of(stages, microbatches, devices, training=training))


def as_text(schedule: Schedule) -> str:
    """One line per cycle, one column per device."""
    lines = [",".join(" ".join(map(str, cell)) for cell in cycle) for cycle in cycles(schedule)]
    return "\n".join(lines) + "\n"


def test_golden_cycles(golden) -> None:
    golden("schedule_popart_3x5_cycles.csv", as_text(popart(3, 5)))
    golden("schedule_popart_tied_head_cycles.csv", as_text(popart(4, 7, (0, 1, 2, 0))))
    golden("schedule_popart_4x8.csv", popart(4, 8).to_csv())


def test_the_example_of_popart_s_note() -> None:
    """F=3, G=5: 9 cycles, of which one has every stage at work."""
    table = cycles(popart(3, 5))
    assert len(table) == 9
    assert table[4] == (
        (Action(0, "F", 4), Action(0, "B", 0)),
        (Action(1, "F", 3), Action(1, "B", 1)),
        (Action(2, "F", 2), Action(2, "B", 2)),
    )


shapes = st.integers(1, 6).flatmap(
    lambda depth: st.tuples(
        st.lists(st.integers(0, 3), min_size=depth, max_size=depth),
        st.integers(0, 9),
        st.booleans(),
    )
)


@given(shapes)
def test_cycles_respect_dependencies(shape) -> None:
    devices, more, training = shape
    numbers = PipelineStages.of(devices, training=training)
    made = popart(len(devices), numbers.total + more, devices, training=training)
    assert made.total_order()
    when = {}
    for number, cycle in enumerate(cycles(made)):
        for cell in cycle:
            for position, action in enumerate(cell):
                when[action] = (number, position)
    assert len(when) == len(devices) * made.num_microbatches * (1 + training)
    assert len(cycles(made)) == made.num_microbatches + numbers.total - 1
    for action, (cycle, position) in when.items():
        for needed in requirements(action, len(devices)):
            same = numbers.cycle_of(needed) == cycle
            assert when[needed] < (cycle, position) if same else when[needed][0] < cycle
            if same:  # only what shares a device may share a cycle
                assert devices[needed.stage] == devices[action.stage]


@given(st.integers(1, 7), st.integers(0, 8))
def test_stash_is_that_of_popart(depth: int, more: int) -> None:
    made = popart(depth, 2 * depth - 1 + more)
    kept = POPART.in_flight(PipelineShape.of(depth, made.num_microbatches))
    for stage in range(depth):
        assert made.peak_in_flight(stage) == kept[stage] == 2 * (depth - 1 - stage) + 1


def test_consecutive_stages_on_one_device_count_once() -> None:
    assert PipelineStages.of([0, 0, 1, 1, 0], training=True) == PipelineStages(
        (0, 0, 1, 1, 2), 3, training=True
    )
    made = popart(3, 3, (0, 0, 1))
    assert len(made.rows) == 2
    assert made.rows[0][-2:] == (Action(1, "B", 2), Action(0, "B", 2))
    assert len(cycles(made)) == 3 + 2


def test_inference_has_forward_stages_only() -> None:
    made = popart(3, 3, training=False)
    assert {action.kind for row in made.rows for action in row} == {"F"}
    assert len(cycles(made)) == 3 + 2


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4), {}, "num_stages must be at least 1, got 0"),
        ((2, 0), {}, "num_microbatches must be at least 1, got 0"),
        ((3, 4), {}, "3 stages as 5 pipeline stages and needs at least 5 microbatches per step, "
                     "got 4; raise gradient accumulation to 5"),
        ((3, 2), {"training": False}, "at least 3 microbatches per step, got 2; raise device"),
        ((3, 9, (0, 1)), {}, "stage_devices has 2 entries for 3 stages"),
    ],
)  # fmt: skip
def test_refusals(arguments, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        popart(*arguments, **options)
