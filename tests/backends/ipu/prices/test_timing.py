from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipu_pipeline.backends.ipu.prices import (
    DEFAULT_CALIBRATION,
    IPUSettings,
    StageTime,
    chip_named,
)
from ipu_pipeline.backends.ipu.prices.layout import PlacedProgram, make_layout
from ipu_pipeline.backends.ipu.prices.predict import Prediction
from ipu_pipeline.backends.ipu.prices.timing import (
    copy_time,
    cycle_loads,
    input_time,
    step_time,
    update_times,
)
from tests.backends.ipu.prices.ipu_graphs import VOCAB, layered

CHIP = chip_named("ipu-gc200")
BOW = chip_named("ipu-bow")
RUN = IPUSettings(num_ipus=4, layers_per_ipu=(1, 1, 1, 1), accumulation=16, proportions=(0.2,) * 4)
GRAPH = layered(4)


def _placed(run=RUN, graph=GRAPH, chip=CHIP, kind=PlacedProgram) -> PlacedProgram:
    return kind(graph, make_layout(graph, run), run, chip)


def _step(graph=GRAPH, run=RUN, chip=CHIP, calibration=DEFAULT_CALIBRATION):
    return step_time(_placed(run, graph, replace(chip, calibration=calibration)))


def _balanced(num: int, forward: float, backward: float) -> list[StageTime]:
    return [StageTime(ipu, forward, backward, 0.0) for ipu in range(num)]


def test_balanced_pipeline_is_the_published_formula() -> None:
    # POPART_PIPELINE.md: F=3, G=5 balanced: 9 cycles, time 7 (f+b)
    fill, main, flush = cycle_loads(_balanced(3, 1.0, 2.0), training=True)
    assert len(fill) + len(flush) + (5 - 4) == 9
    assert sum(fill) + main * (5 - 4) + sum(flush) == pytest.approx(7 * 3.0)


@given(st.integers(1, 8), st.integers(0, 40), st.floats(0.1, 3), st.floats(0.1, 3))
def test_balanced_pipelines_of_any_depth(num: int, more: int, forward: float, back: float) -> None:
    count = 2 * num - 1 + more
    fill, main, flush = cycle_loads(_balanced(num, forward, back), training=True)
    total = sum(fill) + main * (count - len(fill)) + sum(flush)
    assert total == pytest.approx((count + num - 1) * (forward + back))


def test_a_head_back_on_ipu_0_adds_to_its_cycle() -> None:
    stages = [StageTime(0, 1, 2, 1), StageTime(1, 3, 4, 3), StageTime(0, 5, 6, 0)]
    fill, main, flush = cycle_loads(stages, training=True)
    assert main == (5 + 6) + 1 + (2 + 1)
    assert fill == (1, 3, 12, 12)
    assert flush == (14, 14, 7, 3)


def test_inference_has_forward_stages_only() -> None:
    fill, main, flush = cycle_loads(_balanced(3, 1.0, 0.0), training=False)
    assert (fill, main, flush) == ((1, 1), 1, (1, 1))


def test_cycles_are_counted_as_popart_does() -> None:
    step = _step(run=replace(RUN, accumulation=20))
    assert step.num_cycles == (8, 12, 8)  # F = 5: the tied head is back on IPU 0


def test_the_last_stage_recomputes_nothing() -> None:
    times = _step().stages
    assert times[-1].recompute_s == 0
    assert all(stage.recompute_s == stage.forward_s > 0 for stage in times[:-1])


def test_copies_by_hand() -> None:
    size = 4 * 128 * 256 * 2
    # 1 -> 2 crosses the slow side of the board; the gradient goes the other way in the same phase
    expected = CHIP.link_latency_s + size / (32e9 * DEFAULT_CALIBRATION.copy_share)
    assert copy_time(_placed()) == pytest.approx(expected)


def test_inputs_share_the_boards_network() -> None:
    size = 4 * 128 * 4  # token ids travel as int32
    assert input_time(GRAPH, RUN, CHIP) == size / 12.5e9
    pairs = replace(RUN, num_ipus=2, layers_per_ipu=(2, 2), replicas=8)
    assert input_time(GRAPH, pairs, CHIP) == 2 * size / 12.5e9


def test_optimizer_by_place() -> None:
    on_chip = update_times(_placed())
    away = replace(RUN, optimizer_offchip=True)
    streamed = update_times(_placed(away))
    elements = VOCAB * 256 + 4 * 256 * 256
    assert on_chip[1] == 0
    assert streamed[1] == pytest.approx(2 * 8 * elements / 20e9)
    sharded = replace(away, replicas=4, sharded=True)
    quarter = update_times(_placed(sharded))
    assert quarter[1] == pytest.approx(streamed[1] / 4)


def test_all_reduce_by_hand() -> None:
    many = replace(RUN, replicas=4)
    most = VOCAB * 256 + 256 * 256
    expected = 2 * 3 / 4 * most * 2 / (32e9 * DEFAULT_CALIBRATION.copy_share)
    assert update_times(_placed(many))[2] == pytest.approx(expected)
    assert update_times(_placed())[2] == 0


def test_replicas_beyond_a_rack_go_through_the_gateways() -> None:
    near, far = (update_times(_placed(replace(RUN, replicas=r)))[2] for r in (16, 17))
    assert far > 4 * near


def test_the_host_is_paid_once_per_call() -> None:
    once, shared = _step().host_s, _step(run=replace(RUN, device_iterations=4)).host_s
    assert once == DEFAULT_CALIBRATION.step_host_s == 4 * shared


def test_inference_does_not_wait_for_the_host() -> None:
    run = replace(RUN, training=False, accumulation=1, device_iterations=8)
    step = _step(replace(GRAPH, training=False), run)
    assert (step.host_s, step.update_s) == (0, 0)
    assert step.num_cycles == (4, 4, 4)


def test_bow_is_faster_by_at_most_its_clock() -> None:
    ratio = _step().total_s / _step(chip=BOW).total_s
    assert 1.0 < ratio < BOW.clock_hz / CHIP.clock_hz


def test_popart_is_the_faster_front_end() -> None:
    popart = replace(RUN, front_end="popart")
    assert _step(run=popart).cycle_s < _step().cycle_s


def test_without_a_pipeline_there_is_no_ramp() -> None:
    alone = replace(RUN, num_ipus=1, layers_per_ipu=(-1,), pipelined=False, proportions=(0.2,))
    step = _step(run=alone)
    assert step.num_cycles == (0, 16, 0)
    assert step.copy_s == 0


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([64, 128]), st.integers(1, 4))
def test_more_work_takes_longer(batch: int, seq: int, layers: int) -> None:
    run = replace(RUN, num_ipus=1, layers_per_ipu=(-1,), proportions=(0.2,), pipelined=False)
    base = _step(layered(layers, batch, seq), run).total_s
    assert _step(layered(layers, 2 * batch, seq), run).total_s >= base
    assert _step(layered(layers + 1, batch, seq), run).total_s >= base


@settings(max_examples=25, deadline=None)
@given(
    st.floats(1.0, 3.0), st.sampled_from(["clock_hz", "streaming_bytes_per_s", "host_bytes_per_s"])
)
def test_a_better_chip_is_never_slower(factor: float, field: str) -> None:
    run = replace(RUN, optimizer_offchip=True)
    better = replace(CHIP, **{field: getattr(CHIP, field) * factor})
    assert _step(run=run, chip=better).total_s <= _step(run=run).total_s * (1 + 1e-12)


@given(st.integers(1, 8))
def test_off_chip_state_takes_longer(replicas: int) -> None:
    run = replace(RUN, replicas=replicas, sharded=True)
    assert _step(run=replace(run, optimizer_offchip=True)).total_s > _step(run=run).total_s


def test_prediction_counts_samples() -> None:
    found = _placed(replace(RUN, replicas=2), kind=Prediction)
    assert found.samples_per_step == 4 * 16 * 2
    assert found.samples_per_s == pytest.approx(128 / found.time.total_s)
