"""IPUConfig: reading, writing, checking. Overrides are in test_config_overrides.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipu_pipeline.backends.ipu.config import IPUConfig, expand_layers
from ipu_pipeline.backends.ipu.config import ipu_config as config
from ipu_pipeline.errors import ConfigError

# Settings as they stand in published files (values and keys; the sources are the hub pages of
# Graphcore/gpt2-medium-ipu, Graphcore/t5-xl-ipu and a file saved by optimum-graphcore 1.6.1).
PODS = {"pod8": 1, "pod16": 2, "pod32": 4, "pod64": 8, "default": 1}
GPT2_MEDIUM = {
    "embedding_serialization_factor": 5,
    "recompute_checkpoint_every_layer": True,
    "optimizer_state_offchip": True,
    "replicated_tensor_sharding": True,
    "enable_half_first_order_momentum": True,
    "enable_half_partials": True,
    "device_iterations": 2,
    "inference_device_iterations": 9,
    "replication_factor": PODS,
    "inference_replication_factor": PODS,
    "gradient_accumulation_steps": 16,
    "executable_cache_dir": "./exe_cache",
    "ipus_per_replica": 8,
    "layers_per_ipu": [0, 3, 3, 3, 3, 4, 4, 4],
    "matmul_proportion": 0.25,
}
SPLIT16 = [2, 4, 3, 3, 3, 3, 3, 3, 2, 4, 3, 3, 3, 3, 3, 3]
T5_XL = {
    "enable_half_partials": True,
    "executable_cache_dir": "./exe_cache",
    "inference_layers_per_ipu": SPLIT16,
    "inference_matmul_proportion": [0.1, 0.05, *[0.2] * 6, 0.05, 0.05, *[0.2] * 6],
}
SAVED_BY_OPTIMUM = {
    "auto_loss_scaling": False,
    "device_iterations": 1,
    "embedding_serialization_factor": 2,
    "enable_half_partials": True,
    "executable_cache_dir": "/tmp/exe_cache",
    "execute_encoder_on_cpu_for_generation": False,
    "gradient_accumulation_steps": 256,
    "inference_device_iterations": 5,
    "inference_replication_factor": 1,
    "ipus_per_replica": 4,
    "layers_per_ipu": [3, 7, 7, 7],
    "matmul_proportion": [0.15, 0.18, 0.2, 0.25],
    "optimizer_state_offchip": True,
    "optimum_version": "1.6.1",
    "output_mode": "final",
    "recompute_checkpoint_every_layer": True,
    "replicated_tensor_sharding": False,
    "replication_factor": 1,
    "seed": 42,
    "sharded_execution_for_inference": False,
    "transformers_version": "4.20.1",
}


@pytest.mark.parametrize("raw", [GPT2_MEDIUM, T5_XL, SAVED_BY_OPTIMUM])
def test_published_files_survive_reading_and_writing(tmp_path, raw) -> None:
    (tmp_path / "ipu_config.json").write_text(json.dumps(raw))
    config = IPUConfig.load(tmp_path)
    written = json.loads(config.save(tmp_path).read_text())
    assert raw.items() <= written.items()
    assert list(written) == sorted(written)
    assert IPUConfig.load(tmp_path / "ipu_config.json") == config


def test_every_field_survives_a_round_trip() -> None:
    samples = {
        bool: True, str: "all", config.OutputMode: "all", config.IPUs: 2, config.Steps: 3,
        config.Factor: 3, config.Seed: 3,
        config.Layers: [2, 1], config.Splits: [2, 1], config.Shares: [0.5, 0.25],
        config.Tiles: 32, config.Replicas: {"pod16": 4, "default": 2}, Mapping[str, int]: {"a": 1},
        Mapping[str, Any]: {"a": [1]},
    }  # fmt: skip
    samples |= {kind | None: sample for kind, sample in samples.items()}
    raw = {name: samples[kind] for name, kind in config.field_types().items() if name != "foreign"}
    raw |= {"dataset": "squad"}
    raw |= {"ipus_per_replica": 2, "inference_ipus_per_replica": 2}
    del raw["num_io_tiles"]  # of one IPU
    for layer in ("embedding", "projection"):  # splits and factor exclude each other
        for prefix in ("", "inference_"):
            raw.pop(f"{prefix}{layer}_serialization_factor")
    assert IPUConfig.from_dict(raw).to_dict() == raw
    assert IPUConfig.from_dict({"num_io_tiles": 32}).to_dict()["num_io_tiles"] == 32


def test_defaults_are_those_of_the_published_library() -> None:
    config = IPUConfig()
    assert config.layers_per_ipu == (-1,)
    assert config.num_ipus() == 1
    assert config.memory_proportions() == (0.2,)
    assert config.enable_half_partials
    assert config.legacy_notes() == ()


def test_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        IPUConfig().seed = 1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"layer_per_ipu": [1]}, "unknown field 'layer_per_ipu'; did you mean layers_per_ipu"),
        ({"foreign": {"dataset": "x"}}, "the IPU configuration: unknown field 'foreign'"),
        ({"zzz": 1}, "the IPU configuration: unknown field 'zzz'; fields: layers_per_ipu, "),
        ({"seed": 1.5}, r"seed: Expected `int \| null`, got `float`, the value is 1.5"),
        ({"device_iterations": True}, "device_iterations: Expected `int`, got `bool`, .* True"),
        ({"device_iterations": None}, "device_iterations: Expected `int`, got `null`"),
        ({"layers_per_ipu": 4}, "layers_per_ipu: Expected `array`, got `int`, the value is 4"),
        ({"layers_per_ipu": []}, "layers_per_ipu: Expected `array` of length >= 1"),
        ({"layers_per_ipu": [1.0]}, r"layers_per_ipu\[0\]: Expected `int`, got `float`"),
        ({"layers_per_ipu": [1, -2]}, r"layers_per_ipu\[1\]: Expected `int` >= -1, .* is -2"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: Expected `int` >= 1"),
        ({"enable_half_partials": 1}, "enable_half_partials: Expected `bool`, got `int`"),
        ({"executable_cache_dir": 3}, "executable_cache_dir: Expected `str`, got `int`"),
        (
            {"output_mode": "last"},
            "output_mode: Expected one of all, sum, final, default, .* 'last'",
        ),
        ({"matmul_proportion": "0.2"}, r"matmul_proportion: Expected `float \| array`, got `str`"),
        ({"matmul_proportion": []}, "matmul_proportion: Expected `array` of length >= 1"),
        ({"matmul_proportion": 1.5}, "matmul_proportion: Expected `float` <= 1.0, .* is 1.5"),
        ({"replication_factor": "4"}, r"replication_factor: Expected `int \| object`, got `str`"),
        ({"replication_factor": {}}, "replication_factor: Expected `object` of length >= 1"),
        ({"replication_factor": {"pod4": "1"}}, r"replication_factor.*: Expected `int`, got `str`"),
        ({"replication_factor": {"pod4": 0}}, r"replication_factor.*: Expected `int` >= 1"),
        ({"parallelize_kwargs": [1]}, r"parallelize_kwargs: Expected `object \| null`, got `arr"),
        (
            {"layers_per_ipu": [1, 2], "ipus_per_replica": 4},
            r"layers_per_ipu=\[1, 2\] has 2 entries, but a replica has 4 IPUs .*make them equal",
        ),
        (
            {"layers_per_ipu": [1, -1], "ipus_per_replica": 4},
            r"layers_per_ipu=\[1, -1\] has 2 entries, but a replica has 4 IPUs",
        ),
        (
            {"ipus_per_replica": 4, "matmul_proportion": [0.1, 0.2]},
            r"matmul_proportion=\[0.1, 0.2\] has 2 entries, but a replica has 4 IPUs",
        ),
        (
            {"inference_layers_per_ipu": [1, 2], "inference_ipus_per_replica": 4},
            r"inference_layers_per_ipu=\[1, 2\] has 2 entries, but a replica has 4 IPUs",
        ),
        (
            {"inference_layers_per_ipu": [1, 2], "inference_matmul_proportion": [0.1]},
            r"inference_matmul_proportion=\[0.1\] has 1 entries, but a replica has 2 IPUs",
        ),
        (
            {
                "layers_per_ipu": [1, 1],
                "embedding_serialization_factor": 2,
                "serialized_embedding_splits_per_ipu": [1, 1],
            },
            "embedding_serialization_factor=2 and serialized_embedding_splits.* exclude each other",
        ),
        (
            {"ipus_per_replica": 4, "serialized_projection_splits_per_ipu": [1, 1]},
            "serialized_projection_splits_per_ipu=.* has 2 entries, but a replica has 4 IPUs",
        ),
        (
            {"layers_per_ipu": [1, 1], "serialized_embedding_splits_per_ipu": [0, 0]},
            "serialized_embedding_splits_per_ipu=.* has no split; give at least one IPU one",
        ),
        (
            {"layers_per_ipu": [1, 1, 1], "serialized_embedding_splits_per_ipu": [1, 0, 1]},
            "serialized_embedding_splits_per_ipu=.* leaves a gap",
        ),
    ],
)
def test_wrong_settings_are_named(raw, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IPUConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the IPU configuration .*ipu_config.json"),
        ("[1]", "ipu_config.json: expected an object with fields, got list"),
        ('{"seed": "x"}', r"ipu_config.json, seed: Expected `int \| null`, got `str`"),
        (
            '{"layers_per_ipu": [1, 1], "matmul_proportion": [1, 1, 1]}',
            "ipu_config.json: matmul_propor",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path, text: str, message: str) -> None:
    (tmp_path / "ipu_config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        IPUConfig.load(tmp_path)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the IPU configuration .*none\.json"):
        IPUConfig.load(tmp_path / "none.json")


# ---------------------------------------------------------------- meaning


def test_inference_falls_back_to_training() -> None:
    config = IPUConfig(layers_per_ipu=(1, 2), matmul_proportion=(0.3, 0.4))
    assert config.layers(inference=True) == (1, 2)
    assert config.num_ipus(inference=True) == 2
    assert config.memory_proportions(inference=True) == (0.3, 0.4)


def test_inference_may_use_other_ipus() -> None:
    config = IPUConfig.from_dict(T5_XL)
    assert (config.num_ipus(), config.num_ipus(inference=True)) == (1, 16)
    assert config.resolve_layers(48, inference=True) == tuple(SPLIT16)
    config = IPUConfig(
        layers_per_ipu=(1, 1), matmul_proportion=(0.3, 0.4), inference_layers_per_ipu=(2,)
    )
    assert config.memory_proportions(inference=True) == (0.2,)
    config = IPUConfig(ipus_per_replica=4, inference_ipus_per_replica=2)
    assert (config.num_ipus(), config.num_ipus(inference=True)) == (4, 2)
    assert IPUConfig(ipus_per_replica=4).num_ipus(inference=True) == 4


def test_replicas_by_pod_type() -> None:
    config = IPUConfig.from_dict(GPT2_MEDIUM)
    assert config.replicas() == 1
    assert config.for_pod("pod16").replication_factor == 2
    assert config.for_pod("pod64").inference_replication_factor == 8
    assert config.for_pod(None).replication_factor == 1
    assert IPUConfig(replication_factor=2).for_pod("pod16").replication_factor == 2


def test_wrong_pod_types() -> None:
    config = IPUConfig.from_dict(GPT2_MEDIUM)
    with pytest.raises(ConfigError, match="pod type 'rack' is unknown; write pod4"):
        config.for_pod("rack")
    with pytest.raises(ConfigError, match="pod4 has 4 IPUs, 1 replica of 8 IPUs need 8"):
        config.for_pod("pod4")
    no_default = IPUConfig(replication_factor={"pod16": 2})
    with pytest.raises(ConfigError, match="has no entry for 'pod8'; it has pod16"):
        no_default.for_pod("pod8")
    with pytest.raises(ConfigError, match="has no entry for 'default'"):
        no_default.replicas()


def test_settings_without_effect_are_said() -> None:
    notes = IPUConfig(use_popdist=True, profile_dir="").legacy_notes()
    assert notes == ("use_popdist=True has no effect; it is kept for the file only",)


# Of optimum-graphcore: v0.1.0 examples/question-answering, v0.5.0 examples/language-modeling,
# v0.6.1 tests/ipu_config_trainer_test.json.
QUESTION_ANSWERING = """{"dataloader_workers": 64, "async_dataloader": true, "ipus_per_replica": 4,
 "synthetic_data": false, "optimizer": "AdamW", "weight_decay": 0.0,
 "embedding_serialization_factor": 1, "recompute_checkpoint_every_layer": true,
 "replicated_tensor_sharding": false, "optimizer_state_offchip": true,
 "enable_half_first_order_momentum": false, "enable_half_partials": true, "layer_norm_eps": 0.001,
 "attention_probs_dropout_prob": 0.0, "mask_tokens": 20, "replication_factor": 4,
 "gradient_accumulation_steps": 16, "device_iterations": 4, "executable_cache_dir": "./exe_cache",
 "replicated_tensor_sharding": true, "dataset": "squad", "layers_per_ipu": [0, 4, 4, 4],
 "matmul_proportion": [0.25], "attention_probs_dropout_prob": 0.1, "learning_rate": 6e-5,
 "lr_schedule": "linear", "loss_scaling": 64.0, "weight_decay": 0.01, "lr_warmup": 0.1,
 "optimizer": "AdamW"}"""
LANGUAGE_MODELING = """{"embedding_serialization_factor": 1,
 "recompute_checkpoint_every_layer": true, "optimizer_state_offchip": true,
 "replicated_tensor_sharding": true, "enable_half_first_order_momentum": false,
 "enable_half_partials": true, "replication_factor": 4, "gradient_accumulation_steps": 512,
 "device_iterations": 1, "executable_cache_dir": "./exe_cache", "ipus_per_replica": 4,
 "layers_per_ipu": [0, 4, 4, 4], "matmul_proportion": [0.25]}"""
TRAINER_TEST = """{"dataloader_workers": 64, "async_dataloader": true, "ipus_per_replica": 4,
 "weight_decay": 0.0, "embedding_serialization_factor": 1,
 "recompute_checkpoint_every_layer": true, "replicated_tensor_sharding": false,
 "optimizer_state_offchip": true, "layer_norm_eps": 0.001, "mask_tokens": 20,
 "output_mode": "all", "executable_cache_dir": "disabled", "replicated_tensor_sharding": true}"""


@pytest.mark.parametrize("text", [QUESTION_ANSWERING, LANGUAGE_MODELING, TRAINER_TEST])
def test_files_of_early_releases_are_read_as_they_read_them(tmp_path, text: str) -> None:
    """One proportion is every IPU's, the last of two equal keys counts, others' keys are kept."""
    raw = json.loads(text)
    (tmp_path / "ipu_config.json").write_text(text)
    found = IPUConfig.load(tmp_path)
    for inference in (False, True):
        share = raw.get("matmul_proportion", [0.2])[0]
        assert found.memory_proportions(inference=inference) == (share,) * 4
    assert found.replicated_tensor_sharding
    notes = found.legacy_notes()
    for key in {"async_dataloader", "layer_norm_eps", "mask_tokens"} & raw.keys():
        assert any(note.startswith(f"{key}={raw[key]!r} has no effect here: it ") for note in notes)
    assert raw.items() <= json.loads(found.save(tmp_path).read_text()).items()
    assert IPUConfig.load(tmp_path) == found


@pytest.mark.parametrize(
    ("written", "ipus", "layers", "expected"),
    [
        ([-1], 4, 12, (3, 3, 3, 3)),
        ([-1], 4, 14, (3, 3, 3, 5)),
        ([1, 2, -1, -1], 4, 12, (1, 2, 4, 5)),
        ([-1, 0, -1, 2], 4, 9, (3, 0, 4, 2)),
        ([0, 4, 4, 4], 4, 12, (0, 4, 4, 4)),
        ([4], 1, 12, (12,)),
        ([-1, -1], 2, 1, (0, 1)),
    ],
)
def test_wildcards(written, ipus: int, layers: int, expected) -> None:
    assert expand_layers(written, ipus, layers) == expected


@pytest.mark.parametrize(
    ("written", "ipus", "message"),
    [
        ([1, 2], 4, r"layers_per_ipu=\[1, 2\] has 2 entries for 4 IPUs"),
        ([6, 7], 2, "places 13 layers, the model has 12"),
        ([5, 5], 2, "places 10 layers, the model has 12; change the numbers, or write -1"),
        ([13, -1], 2, "places 13 layers, the model has 12"),
    ],
)
def test_layers_that_do_not_fit_the_model(written, ipus: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand_layers(written, ipus, 12)


@given(st.lists(st.integers(-1, 5), min_size=2, max_size=8), st.integers(0, 40))
def test_expansion_keeps_written_numbers_and_places_every_layer(written, num_layers) -> None:
    try:
        found = expand_layers(written, len(written), num_layers)
    except ConfigError:
        fixed = sum(count for count in written if count != -1)
        assert fixed > num_layers or (-1 not in written and fixed != num_layers)
        return
    assert sum(found) == num_layers
    assert min(found) >= 0
    assert all(count in (-1, got) for count, got in zip(written, found, strict=True))
