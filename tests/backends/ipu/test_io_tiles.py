"""Tiles that load the next inputs while the others compute: refused, priced, emitted, run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.check import check
from ipu_pipeline.backends.ipu.prices import chip_named, predict
from ipu_pipeline.backends.ipu.prices.predict import prediction_of
from ipu_pipeline.backends.ipu.prices.timing import input_time
from ipu_pipeline.backends.ipu.settings import ipu_config_of_plan, settings_for
from ipu_pipeline.errors import ConfigError, LoweringError, PartitionError
from tests.backends.ipu.emulated import assert_same_weights, case, sessions_of

IO_TILES = 64


def test_a_step_equals_the_local_targets(poptorch: Any) -> None:
    made = case(layers=(4,), num_io_tiles=IO_TILES, decompose_grad_sum=True)
    with made.local() as local:
        device = made.compile()
        ours, theirs = (one.train_step(made.batch()).loss for one in (device, local))
        assert ours == pytest.approx(theirs, abs=1e-6)
        executor = sessions_of(device).training
        program, options = executor.program, executor.options
        assert program.overlapped
        assert not program.pipelined
        assert len(program.overlaps) == len(made.example)
        assert options.toDict()["numIOTiles"] == IO_TILES
        assert options._Popart.options["decomposeGradSum"] is True
        assert device.eval_step(made.batch(2)).loss == pytest.approx(
            local.eval_step(made.batch(2)).loss, abs=1e-5
        )
        assert sessions_of(device).inference.program.overlapped
        device.close()
        assert_same_weights(made.model, local.model)


def test_compute_has_fewer_tiles_and_hides_the_input() -> None:
    plain, made = (case(layers=(4,), num_io_tiles=tiles).plan for tiles in (None, IO_TILES))
    whole, split = prediction_of(plain), prediction_of(made)
    assert split.chip.tiles == chip_named("ipu-gc200").tiles - IO_TILES
    assert split.chip.memory_bytes < whole.chip.memory_bytes
    assert split.time.stages[0].forward_s > whole.time.stages[0].forward_s
    load_s = input_time(made.graph, split.settings, split.chip)
    # four microbatches: the first and the last load are not hidden, and compute is longer
    assert split.time.input_s == pytest.approx(load_s * 2 / 4)
    assert whole.time.input_s == pytest.approx(load_s)
    assert made.objective_s == pytest.approx(split.time.total_s)
    assert made.objective_s >= made.lower_bound_s
    config = ipu_config_of_plan(made)
    assert config.num_io_tiles == IO_TILES
    again = predict(made.graph, config, made.machine)
    assert again.time.total_s == pytest.approx(split.time.total_s)
    assert f"{IO_TILES} I/O tiles" in again.text()


def test_an_open_number_of_ipus_is_one() -> None:
    made = case(layers=(-1,), num_io_tiles=IO_TILES)
    assert made.plan.num_stages == 1
    with pytest.raises(PartitionError, match="on one IPU only"):
        ipp.plan(made.model, made.example, machine="pod4", num_stages=2, config=made.config)


def test_what_poptorch_would_refuse() -> None:
    for tiles in (30, 33, 194):
        with pytest.raises(ConfigError, match="num_io_tiles"):
            ipp.IPUConfig(num_io_tiles=tiles)
    for prefix in ("", "inference_"):
        with pytest.raises(ConfigError, match=f"{prefix}layers_per_ipu.*leave num_io_tiles out"):
            ipp.IPUConfig(num_io_tiles=32, **{f"{prefix}layers_per_ipu": (2, 2)})
    with pytest.raises(PartitionError, match="'all' and 'sum' only"):
        case(layers=(4,), num_io_tiles=32, output_mode="final")
    made = case(layers=(4,), num_io_tiles=32)
    graph = made.plan.graph
    large = replace(graph.inputs[0], shape=(33, chip_named("ipu-gc200").tile_memory_bytes))
    plan = replace(made.plan, graph=replace(graph, inputs=(large, *graph.inputs[1:])))
    with pytest.raises(LoweringError, match="32 I/O tiles hold"):
        check(plan, settings_for(made.plan, made.config))
