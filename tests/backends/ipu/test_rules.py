"""What is planned is emitted: tied heads, losses, tables that few numbers divide, decoders."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.backend import BACKEND
from ipu_pipeline.backends.ipu.bundle import emit
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices import predict
from ipu_pipeline.backends.ipu.prices.predict import prediction_of
from ipu_pipeline.backends.ipu.settings import settings_for
from ipu_pipeline.capture import capture
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.cli import app
from ipu_pipeline.errors import ConfigError, PartitionError
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.planner.search import Constraints
from tests.later import one_in

START = {"decoder_start_token_id": 0, "pad_token_id": 0}
ENCODER_DECODER = {**START, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 4, "num_heads": 2}
SEQUENCES = {
    "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
CONFIGS = {
    "t5": (transformers.T5Config(vocab_size=128, **ENCODER_DECODER), "seq2seq-lm"),
    "mt5": (transformers.MT5Config(vocab_size=128, **ENCODER_DECODER), "seq2seq-lm"),
    "bart": (transformers.BartConfig(vocab_size=128, **SEQUENCES), "seq2seq-lm"),
    "bert": (
        transformers.BertConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
            intermediate_size=64,
        ),
        "masked-lm",
    ),
    "gpt2": (
        transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=4, n_head=2), "causal-lm"
    ),
    "opt": (
        transformers.OPTConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, ffn_dim=64,
            word_embed_proj_dim=32,
        ),
        "causal-lm",
    ),
    "bloom": (
        transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=4, n_head=2), "causal-lm"
    ),
}  # fmt: skip
POD = machine_by_name("pod4")


@pytest.mark.parametrize(
    ("num_stages", "name"),
    one_in(8, product((2, 4), CONFIGS)),  # seven models
)
def test_what_is_planned_is_emitted_and_priced_once(
    name: str, num_stages: int, tmp_path: Path
) -> None:
    model, batch = from_config(*CONFIGS[name], batch_size=1, seq_length=16)
    plan = ipp.plan(model, batch, machine=POD, num_stages=num_stages, microbatches=16)
    emit(plan, settings_for(plan), tmp_path)
    assert max(stage.device for stage in plan.stages) + 1 == num_stages
    config = IPUConfig.load(tmp_path)
    assert config.recompute is not None
    again = ipp.plan(model, batch, machine=POD, config=config)
    assert [(s.device, s.blocks) for s in again.stages] == [
        (s.device, s.blocks) for s in plan.stages
    ]
    assert again.objective_s == plan.objective_s
    assert simulate(plan).step_s == plan.objective_s
    prediction = predict(capture(model, batch).graph, config, POD)
    assert prediction.time.total_s == plan.objective_s
    said = json.loads((tmp_path / "settings.json").read_text())
    assert said["recompute"] == (config.recompute and num_stages > 1)


def test_layers_that_are_left_open_are_placed_alike_through_every_door(tmp_path: Path) -> None:
    CONFIGS["bert"][0].save_pretrained(tmp_path)

    def predicted(**said: object) -> str:
        path = IPUConfig(ipus_per_replica=2, **said).save(tmp_path)
        asked = ("predict", str(tmp_path), "--task", "masked-lm", "--ipu-config", str(path),
                 "--machine", "pod4", "--seq-length", "16")  # fmt: skip
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 0, result.output
        return result.output

    model, batch = from_config(*CONFIGS["bert"], batch_size=1, seq_length=16)
    config = IPUConfig(ipus_per_replica=2, gradient_accumulation_steps=8)
    plan = ipp.plan(model, batch, machine=POD, config=config)
    again = prediction_of(plan)
    assert again.time.total_s == plan.objective_s
    assert predicted(gradient_accumulation_steps=8).strip() == again.text().strip()
    even = predict(plan.graph, replace(config, layers_per_ipu=(2, 2)), POD)
    said = predicted(gradient_accumulation_steps=8, layers_per_ipu=(2, 2))
    assert said.strip() == even.text().strip()
    assert "PopART refuses this" in predicted(gradient_accumulation_steps=1)


def test_a_decoders_embedding_may_come_back_to_the_first_ipu() -> None:
    """An encoder of some size: its layers need not all be on the IPU of the shared embedding."""
    config = transformers.T5Config(
        vocab_size=128, d_model=256, d_kv=64, d_ff=1024, num_layers=12, num_decoder_layers=4,
        num_heads=4, **START,
    )  # fmt: skip
    model, batch = from_config(config, "seq2seq-lm", batch_size=4, seq_length=128)
    plan = ipp.plan(model, batch, machine=POD, num_stages=4, microbatches=32)
    assert [stage.device for stage in plan.stages].count(0) == 3
    assert plan.gap < 0.01


def test_a_head_that_eight_does_not_divide() -> None:
    """Whisper has 51,865 tokens: slices that do not divide them are never planned."""
    config = transformers.GPT2Config(vocab_size=51_865, n_embd=64, n_layer=2, n_head=2)
    model, batch = from_config(config, "causal-lm", batch_size=8, seq_length=128)
    plan = ipp.plan(model, batch, machine=POD, num_stages=2, microbatches=8)
    for stage in plan.stages:
        assert all(51_865 % factor == 0 for factor in stage.serialize.values())
    settings_for(plan)


def test_single_blocks_are_not_recomputed(tmp_path: Path) -> None:
    """PopART recomputes whole stages: such a plan would run otherwise than it is priced."""
    model, batch = from_config(*CONFIGS["bert"], batch_size=1, seq_length=16)
    message = "PopART recomputes every stage but the last, or none"
    asked = {"machine": POD, "num_stages": 2, "microbatches": 8}
    one = "recompute{blocks=[bert.encoder.layer.0]}"
    with pytest.raises(PartitionError, match=f"and not 'bert.embeddings', but {message}"):
        ipp.plan(model, batch, **asked, passes=one)
    limits = Constraints(recompute=("bert.encoder.layer.0",))
    with pytest.raises(PartitionError, match=f"single blocks .*layer.0.*, but {message}"):
        ipp.plan(model, batch, **asked, constraints=limits)
    plan = ipp.plan(model, batch, **asked, passes="recompute{blocks=all}")
    *earlier, last = (bool(stage.recompute) for stage in plan.stages)
    assert (set(earlier), last) == ({True}, False)
    plan.save(tmp_path / "plan.json")
    edited = json.loads((tmp_path / "plan.json").read_text())
    edited["stages"][0]["recompute"] = ["bert.encoder.layer.0"]
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    with pytest.raises(PartitionError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_what_would_not_be_emitted_is_not_planned() -> None:
    """Tables on several IPUs, losses that nobody gets, stages that no module's call begins."""
    config = transformers.BertConfig(
        vocab_size=4098, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    model, batch = from_config(config, "masked-lm", batch_size=1, seq_length=16)

    def refused(message: str, **said: object) -> None:
        asked = IPUConfig(layers_per_ipu=(2, 2), gradient_accumulation_steps=8, **said)
        with pytest.raises(PartitionError, match=message):
            ipp.plan(model, batch, machine=POD, config=asked)

    with pytest.raises(ConfigError, match="in 4 slices, but its table has 4098 rows"):
        refused("^$", serialized_embedding_splits_per_ipu=(2, 2))
    refused("device_iterations 2 with output_mode 'default'", device_iterations=2,
            output_mode="default")  # fmt: skip
    refused("matmul_proportion 0.0 must be above 0", matmul_proportion=0.0)
    with pytest.raises(ConfigError, match=r"inference: layers_per_ipu=\[3, 0\] places 3 layers"):
        refused("^$", inference_layers_per_ipu=(3, 0))
    gap = "IPU 1 has no stage although IPU 2 has one; number"
    with pytest.raises(PartitionError, match=gap):
        ipp.plan(
            model,
            batch,
            machine=POD,
            config=IPUConfig(layers_per_ipu=(2, 0, 2), gradient_accumulation_steps=8),
        )
    with pytest.raises(PartitionError, match="IPU 0 has no stage although IPU 1 has one; number"):
        ipp.plan(model, batch, machine=POD, constraints=Constraints(stage_devices=(1, 1)))
    asked = IPUConfig(layers_per_ipu=(2, 2))
    with pytest.raises(
        PartitionError, match=r"3 forward stages need .* at least 5, it is 4; raise"
    ):
        ipp.plan(model, batch, machine=POD, config=asked, microbatches=4)
    starts = {"bert.embeddings": 0, "bert.encoder.layer.2": 1, "loss": 0}
    refused("begins stage 2 with 'loss', which is no module's call; move", stage_starts=starts)
    config = transformers.AlbertConfig(
        vocab_size=99, embedding_size=16, hidden_size=32, num_hidden_layers=4,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    albert = from_config(config, "question-answering", batch_size=1, seq_length=16)
    asked = IPUConfig(layers_per_ipu=(2, 2), gradient_accumulation_steps=8)
    with pytest.raises(
        PartitionError, match=r"calls module 'albert.* on IPUs 0 and 1, but its wei"
    ):
        ipp.plan(*albert, machine=POD, config=asked)
    plan = ipp.plan(model, batch, machine=POD, num_stages=2, microbatches=8)
    first, *rest = plan.stages
    spread = replace(first, table_slices={"bert.embeddings": (0, 1)})
    with pytest.raises(PartitionError, match="stage 0 holds the slices 0 to 0 of the table of 'b"):
        prediction_of(replace(plan, stages=(spread, *rest)))
    without = replace(plan.graph, inputs=())
    with pytest.raises(PartitionError, match="the plan's inputs have no batch axis"):
        BACKEND.settings(without, None, Constraints())


def test_a_single_memory_proportion_is_every_ipus() -> None:
    """However many IPUs the search takes: the configuration names none."""
    model, batch = from_config(CONFIGS["bert"][0], CONFIGS["bert"][1], batch_size=1, seq_length=16)
    for proportion in (0.1, (0.1,)):
        asked = IPUConfig(matmul_proportion=proportion, gradient_accumulation_steps=8)
        plan = ipp.plan(model, batch, machine=POD, config=asked, num_stages=3)
        ipus = 1 + max(stage.device for stage in plan.stages)
        assert ipus > 1
        assert plan.settings["proportions"] == [0.1] * ipus
        assert settings_for(plan, asked).to_json()["memory_proportions"] == [0.1] * ipus


def test_measured_prices_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ipu_pipeline.backends.local.measure.profile_blocks", pytest.fail)
    model, batch = from_config(*CONFIGS["bert"], batch_size=1, seq_length=16)
    with pytest.raises(PartitionError, match="not by what this machine measured; use costs='anal"):
        ipp.plan(model, batch, machine=POD, num_stages=2, costs="profiled")
