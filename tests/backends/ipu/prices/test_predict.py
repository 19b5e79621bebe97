from __future__ import annotations

from dataclasses import fields, replace

import pytest

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices import (
    Calibration,
    IPUSettings,
    Prediction,
    chip_named,
    chip_of,
    is_ipu,
    predict,
)
from ipu_pipeline.backends.ipu.prices.layout import make_layout
from ipu_pipeline.errors import ConfigError, PlanError
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.machines import ipu_facts, machine_by_name
from tests.backends.ipu.prices.ipu_graphs import layered

GRAPH = layered(4)
CONFIG = IPUConfig(
    layers_per_ipu=(0, 2, 1, 1), gradient_accumulation_steps=16, replication_factor=4,
    matmul_proportion=0.25, embedding_serialization_factor=2, optimizer_state_offchip=True,
    replicated_tensor_sharding=True, recompute_checkpoint_every_layer=True,
)  # fmt: skip


def test_at_most_eight_constants() -> None:
    assert len(fields(Calibration)) <= 8
    for item in fields(Calibration):
        assert f"{item.name}:" in (Calibration.__doc__ or "")


def test_generations_differ_by_clock_only() -> None:
    gc200, bow = chip_named("ipu-gc200"), chip_named("ipu-bow")
    assert replace(bow, name=gc200.name, clock_hz=gc200.clock_hz) == gc200
    assert (gc200.clock_hz, bow.clock_hz) == (1.33e9, 1.85e9)
    assert gc200.memory_bytes == 897 * 2**20


def test_peaks_follow_from_the_facts() -> None:
    for kind, peak in (("ipu-gc200", 250e12), ("ipu-bow", 348.5e12)):
        chip = chip_named(kind)
        assert 2 * chip.tiles * chip.macs_per_cycle("16.16") * chip.clock_hz == pytest.approx(
            peak, rel=0.005
        )


def test_links_of_a_board() -> None:
    chip = chip_named("ipu-gc200")
    speeds = [chip.link_bytes_per_s(0, other) for other in (1, 2, 3, 4, 64)]
    assert speeds == [64e9, 32e9, 32e9, 32e9, 6.25e9]


def test_machines_say_what_they_are() -> None:
    assert is_ipu(machine_by_name("pod16"))
    assert chip_of(machine_by_name("bow-pod64")).name == "ipu-bow"
    assert not is_ipu(machine_by_name("a100-80g-x8"))
    again = Machine.from_json(machine_by_name("pod4").to_json())
    assert chip_of(again).name == "ipu-gc200"


def test_other_machines_are_refused() -> None:
    generic = Machine("mine", (Device("cpu", 1, {"float32": 1.0}, 1.0),), Link(1.0))
    with pytest.raises(PlanError, match="devices of kind 'generic'"):
        chip_of(generic)
    with pytest.raises(PlanError, match="no chip facts for 'ipu-mk9'; known generations"):
        ipu_facts("ipu-mk9")


def test_a_published_configuration_is_read_as_it_is() -> None:
    found = predict(GRAPH, CONFIG, machine_by_name("pod16"))
    settings = found.settings
    assert (settings.num_ipus, settings.replicas, settings.accumulation) == (4, 4, 16)
    assert (settings.embedding_factor, settings.projection_factor) == (2, 2)
    assert settings.optimizer_offchip
    assert settings.sharded
    assert settings.proportions == (0.25,) * 4
    assert found.fits
    assert not found.notes
    assert found.samples_per_step == 4 * 16 * 4


def test_the_explanation_names_every_part() -> None:
    text = predict(GRAPH, CONFIG, machine_by_name("pod16")).text()
    words = (
        "weights", "stash", "fullest tile", "recompute ms", "fill", "8 cycles", "flush",
        "state streaming", "all-reduce", "host", "fits", "layer.0 .. layer.1",
    )  # fmt: skip
    for word in words:
        assert word in text


def test_inference_of_a_training_configuration() -> None:
    config = replace(CONFIG, inference_device_iterations=8)
    found = predict(replace(GRAPH, training=False), config, machine_by_name("pod16"))
    assert not found.settings.training
    assert found.samples_per_step == 4 * 8
    assert found.time.update_s == 0


def test_split_tables_are_read() -> None:
    config = IPUConfig(
        layers_per_ipu=(2, 2), gradient_accumulation_steps=8,
        serialized_projection_splits_per_ipu=(1, 3), serialized_embedding_splits_per_ipu=(2, 1),
    )  # fmt: skip
    settings = IPUSettings.from_config(config)
    assert settings.embedding_splits == (2, 1)
    assert settings.projection_splits == (1, 3)
    assert (settings.embedding_factor, settings.projection_factor) == (3, 4)


def test_too_few_microbatches_are_said() -> None:
    found = predict(GRAPH, replace(CONFIG, gradient_accumulation_steps=8), machine_by_name("pod16"))
    assert found.notes == (
        "PopART refuses this: 5 forward stages need gradient_accumulation_steps of at least 9, "
        "it is 8",
    )


def test_what_does_not_fit_is_said() -> None:
    wide, run = layered(2, batch=64, seq=512, hidden=1024), IPUSettings(1, accumulation=4)
    found = Prediction(wide, make_layout(wide, run), run, chip_named("ipu-bow"))
    assert not found.fits
    assert "IPU 0 does not fit: its fullest tile needs" in found.notes[0]
    assert "DOES NOT FIT" in found.text()


def test_a_pod_that_is_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 replicas of 4 IPUs need 16, pod4 has 4"):
        predict(GRAPH, CONFIG, machine_by_name("pod4"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "8.8"}, "precision '8.8' is unknown"),
        ({"replicas": 0}, "must be at least 1"),
        ({"embedding_factor": 0}, "must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IPUSettings(num_ipus=1, **change)


def test_half_partials_choose_the_precision() -> None:
    exact = replace(CONFIG, enable_half_partials=False)
    assert IPUSettings.from_config(exact).precision == "16.32"
    slow = predict(GRAPH, exact, machine_by_name("pod16"))
    assert slow.time.cycle_s > predict(GRAPH, CONFIG, machine_by_name("pod16")).time.cycle_s


def test_a_proportion_that_is_not_given_is_poparts() -> None:
    assert IPUSettings(num_ipus=2, proportions=(0.1,)).proportion(1) == 0.6
