from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.ipu_rows import (
    Row,
    UnjudgeableRowError,
    chip_name,
    load_rows,
    misfit_row,
    placed_layers,
    read_row,
    throughput_row,
)
from tests.backends.ipu.prices.ipu_graphs import layered

FULL = {
    "id": "x",
    "model": "BERT-base",
    "arch": {"layers": 12, "hidden": 768, "heads": 12, "ffn": 3072, "seq_len": 128, "vocab": None},
    "task": "mlm+nsp pretraining",
    "mode": "train",
    "framework": "PopART",
    "layers_per_ipu": [0, 4, 4, 4],
    "ipus_per_replica": 4,
    "embedding_ipu": 0,
    "head_ipu": 0,
    "replication_factor": 4,
    "micro_batch_size": 32,
    "gradient_accumulation": 512,
    "embedding_serialization_factor": 5,
    "matmul_proportion": [0.28, 0.28, 0.28, 0.28, 0.3],
    "optimizer": "LAMB",
    "optimizer_state_offchip": True,
    "replicated_tensor_sharding": True,
    "precision": "16.16",
    "mask_tokens": 20,
}


def _row(**change: object) -> Row:
    return read_row({**FULL, **change})


def test_a_full_row() -> None:
    row = _row()
    settings = row.settings
    assert (row.micro_batch, row.mask_tokens, row.assumptions) == (32, 20, ())
    assert (settings.num_ipus, settings.replicas, settings.accumulation) == (4, 4, 512)
    assert settings.proportions == (0.28,) * 4
    assert settings.projection_factor == settings.embedding_factor == 5
    assert settings.front_end == "popart"
    assert "vocab" not in row.arch


def test_what_is_missing_is_assumed_and_said() -> None:
    row = read_row({"model": "bert", "layers_per_ipu": [6, 6], "replication_note": "8 on POD16"})
    assert row.micro_batch == 1
    assert row.settings.replicas == 8
    assert row.settings.optimizer_offchip
    assert row.settings.front_end == "poptorch"
    assert row.assumptions == (
        "micro batch 1 (not published)",
        "optimizer state off chip (not published)",
        "gradient accumulation 8 (not published)",
    )


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"gradient_accumulation": "16..4096 (batch/DI)"}, "accumulation", 16),
        ({"matmul_proportion": 0.2}, "proportions", (0.2,) * 4),
        ({"matmul_proportion": None}, "proportions", (0.2,) * 4),
        ({"replication_factor": {"pod16": 4, "default": 1}}, "replicas", 4),
        ({"replication_factor": None, "total_ipus": 64}, "replicas", 16),
        ({"precision": "32.32"}, "precision", "32.32"),
        ({"enable_half_partials": False}, "precision", "16.32"),
        ({"activation_checkpoint_dtype": "FLOAT8"}, "checkpoint_bytes", 1),
        ({"head_ipu": None, "pipeline_device_mapping": [0, 1, 2, 3, 0]}, "head_ipu", 0),
        ({"mode": "inference", "gradient_accumulation": 4}, "device_iterations", 4),
        ({"recompute_checkpoint_every_layer": False}, "checkpoint_layers", False),
    ],
)
def test_spellings(change: dict[str, object], field: str, value: object) -> None:
    assert getattr(_row(**change).settings, field) == value


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tensor_parallel": 16}, "not a layer pipeline"),
        ({"framework": "PopXL (phased/TP, NOT a layer pipeline)"}, "not a layer pipeline"),
        ({"layers_per_ipu": None}, "no layers_per_ipu"),
    ],
)
def test_rows_that_cannot_be_judged_say_why(change: dict[str, object], reason: str) -> None:
    with pytest.raises(UnjudgeableRowError, match=reason):
        _row(**change)


def test_out_of_memory_rows_use_the_defaults_of_ipu_config() -> None:
    config = {"model": "gpt2", "ipus": 1, "micro_batch_size": ">20", "recompute": False}
    row = misfit_row({"id": "y", "kind": "oom", "config": config})
    assert row.micro_batch == 21
    assert not row.settings.optimizer_offchip
    assert not row.settings.checkpoint_layers
    assert not row.settings.recompute


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"kind": "host_oom"}, "not an out-of-memory configuration"),
        ({"kind": "oom", "config": {"op": "matmul"}}, "no model is given"),
        ({"kind": "oom", "config": {"model": "gpt2", "ipus_per_replica": 4}}, "no layers_per_ipu"),
    ],
)
def test_other_misfit_rows_say_why(raw: dict[str, object], reason: str) -> None:
    with pytest.raises(UnjudgeableRowError, match=reason):
        misfit_row(raw)


def test_what_was_measured_overrides_the_configuration() -> None:
    measured = {"gradient_accumulation": 64, "device_iterations": 4, "micro_batch_size": 8}
    row = throughput_row(FULL, {**measured, "precision": "16.16 (FP8 activation checkpoints)"})
    assert (row.settings.accumulation, row.settings.device_iterations) == (64, 4)
    assert (row.micro_batch, row.settings.checkpoint_bytes) == (8, 1)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ({"hardware": "Bow Pod16"}, "bow"),
        ({"ipu_generation": "GC200 (Mk2, 1.33 GHz)"}, "gc200"),
        ({}, "gc200"),
    ],
)
def test_generation(raw: dict[str, object], name: str) -> None:
    assert chip_name(raw) == name


def test_counts_of_other_units_are_scaled_to_layers() -> None:
    row = _row(layers_per_ipu=[2, 4, 4, 2])
    placed, note = placed_layers(row, layered(6))
    assert placed is not None
    assert list(placed.values()) == [0, 1, 1, 2, 2, 3]
    assert note == "layers_per_ipu counts 12 layers, scaled to 6"
    assert placed_layers(_row(layers_per_ipu=[3, 3]), layered(6)) == (None, "")


def test_layers_of_an_earlier_list_may_be_left_out() -> None:
    graph = layered(6)
    renamed = {f"layer.{i}": f"conv.{i}" for i in range(2)}
    blocks = [replace(b, name=renamed.get(b.name, b.name)) for b in graph.blocks]
    row = _row(layers_per_ipu=[0, 2, 2])
    placed, note = placed_layers(row, replace(graph, blocks=tuple(blocks)))
    assert placed is not None
    assert list(placed.values()) == [0, 0, 1, 1, 2, 2]
    assert note == "layers_per_ipu does not count the first 2 layers"


def test_files_may_be_lists_or_maps(tmp_path) -> None:
    for content in ([{"id": "a"}, "comment"], {"rows": [{"id": "a"}]}):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(content))
        assert load_rows(path) == [{"id": "a"}]
