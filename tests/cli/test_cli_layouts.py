"""The commands export, import, compare, and predict with a layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from transformers import AutoConfig
from typer.testing import CliRunner

from ipu_pipeline.cli import app
from ipu_pipeline.ir.plan import Plan

RUNNER = CliRunner(env={"COLUMNS": "80"})
SIZES = ("--machine", "h100-x8", "--seq-length", "64")


def invoke(*arguments: str) -> Result:
    return RUNNER.invoke(app, list(arguments))


@pytest.fixture
def llama(tmp_path: Path) -> str:
    config = AutoConfig.for_model(
        "llama", hidden_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=512,
        num_key_value_heads=2, intermediate_size=128, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def test_a_layout_is_predicted_beside_ours(llama: str) -> None:
    done = invoke("predict", llama, "--layout", "Et*3|t|(|)*1,L", "--pp", "2", "--tp", "2",
                  "--global-batch", "16", *SIZES)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "pp 2 x vpp 2, tp 2, cp 1, ep 1, dp 2, ZeRO 1; interleaved, 8 microbatches of 1" in (
        done.output
    )
    for part in ("0: Et*3|", "tokens/s, MFU", "ours for the same sizes: E", "why: ours trains"):
        assert part in done.output
    assert "bfloat16 peak" in done.output


def test_a_hand_made_layout_becomes_a_plan_that_is_compared(llama: str, tmp_path: Path) -> None:
    hand, even = tmp_path / "hand.json", tmp_path / "even.json"
    settings = tmp_path / "settings"
    settings.write_text(
        "--pipeline-model-parallel-layout='Et|t*3L' --bf16 --use-distributed-optimizer"
    )
    asked = ("--format", "megatron", "--microbatches", "8", *SIZES)
    done = invoke("import", str(settings), llama, *asked, "-o", str(hand))
    assert done.exit_code == 0, done.output
    assert f"plan written to {hand}" in done.output
    for name in ("torchtitan", "automodel", "megatron"):
        done = invoke("export", str(hand), "--format", name, "-o", str(settings), "--force")
        assert done.exit_code == 0, done.output
        options = ("--format", name, *SIZES, "-o", str(even), "--force")
        done = invoke("import", str(settings), llama, *options)
        assert done.exit_code == 0, done.output
        stages = [[stage.blocks for stage in Plan.load(file).stages] for file in (hand, even)]
        assert stages[0] == stages[1]
    done = invoke("compare", str(hand), str(even))
    assert done.exit_code == 0, done.output
    assert "hand and even take the same time" in done.output
    done = invoke("export", str(hand), "--format", "torchtitan")
    assert json.loads(done.stdout)["parallelism"]["pipeline_parallel_degree"] == 2
    assert "note: torchtitan shards gradients, too" in done.stderr


_SHORT = ("--layout", "Et*4|L", "--seq-length", "64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --ipu-config and --layout"),
        (("--layout", "EL", "--ipu-config", "x"), "give one of --ipu-config and --layout"),
        (("--layout", "EL"), "--layout needs a machine of GPUs; give --machine, such as h100-x64"),
        (("--layout", "EL", "--pod-type", "pod16"), "are for --ipu-config"),
        (("--ipu-config", "x", "--zero-stage", "1"), "--zero-stage is for --layout"),
        (("--layout", "E|t*4|", "--machine", "h100-x2"), "has 0 times L"),
        ((*_SHORT, "--machine", "h100-x2", "--recompute", "nix"), "recompute 'nix'"),
        ((*_SHORT, "--machine", "pod4"), "pod4 is no machine of GPUs whose kernels"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(
    llama: str, arguments: tuple[str, ...], message: str
) -> None:
    done = invoke("predict", llama, *arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert done.output.count("\n") == 1


def test_a_bare_layout_gets_its_sizes_from_options(llama: str, tmp_path: Path) -> None:
    settings, plan = tmp_path / "settings", tmp_path / "plan.json"
    settings.write_text("Et|t|t|tL")
    asked = ("--format", "megatron", "--pp", "2", "--tp", "2", *SIZES, "-o", str(plan))
    done = invoke("import", str(settings), llama, *asked)
    assert done.exit_code == 0, done.output
    assert [stage.device for stage in Plan.load(plan).stages] == [0, 1, 0, 1]


def test_an_empty_stage_is_no_part_of_a_plan(llama: str, tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.write_text("Et*2||t*2|L")
    done = invoke("import", str(settings), llama, "--format", "megatron", *SIZES, "-o", "x")
    assert done.exit_code == 1
    assert "stage 1 is empty, which a plan cannot hold; price it with predict" in done.output
