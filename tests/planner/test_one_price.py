"""One placement has one price through every door, to the last bit."""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, GPT2Config, LxmertConfig, T5Config, ViTConfig
from typer.testing import CliRunner

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices import predict
from ipu_pipeline.backends.ipu.settings import ipu_config_of_plan
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.cli import app
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.text import milliseconds
from ipu_pipeline.planner.price import price, priced
from ipu_pipeline.planner.report.sensitivity import sensitivity
from ipu_pipeline.planner.report.text import totals
from ipu_pipeline.planner.schedules.simulate import simulate
from tests.later import one_in

MODELS = {
    "bert": (BertConfig(num_hidden_layers=6, hidden_size=256, num_attention_heads=4,
                        intermediate_size=1024), "question-answering"),
    "lxmert": (LxmertConfig(l_layers=2, x_layers=2, r_layers=2, hidden_size=256,
                            num_attention_heads=4, intermediate_size=1024),
               "visual-question-answering"),
    "gpt2": (GPT2Config(n_layer=6, n_embd=256, n_head=4, vocab_size=8192), "causal-lm"),
    "t5": (T5Config(num_layers=3, d_model=256, d_kv=64, d_ff=1024, num_heads=4,
                    vocab_size=8192,
                    decoder_start_token_id=0), "seq2seq-lm"),
    "vit": (ViTConfig(num_hidden_layers=6, hidden_size=256, num_attention_heads=4,
                      intermediate_size=1024, num_labels=10), "image-classification"),
}  # fmt: skip
PODS = ("pod4", "pod16", "bow-pod16")
WHERE = (("pod4", 2), ("pod4", 4), ("pod16", 4), ("bow-pod16", 4), ("a100-80g-x8", 2),
         ("a100-80g-x8", 4), ("threads", 2), ("threads", 4))  # fmt: skip
PLACEMENTS = [(name, *where) for where, name in product(WHERE, MODELS)]


def threads() -> Machine:
    """Like ``local``, without measuring."""
    devices = tuple(Device(f"cpu{i}", 10**10, {"float32": 1e11}, 1e10) for i in range(4))
    return Machine("threads", devices, Link(1e10), shared_memory=True, backend="local")


@cache
def built(name: str, micro_batch: int = 2):
    config, task = MODELS[name]
    return from_config(config, task, batch_size=micro_batch, seq_length=64, device="meta")


@cache
def planned(name: str, machine: str, depth: int, **options) -> Plan:
    model, batch = built(name)
    described = threads() if machine == "threads" else machine
    return ipp.plan(
        model, batch, machine=described, num_stages=depth, microbatches=16, **options
    )  # fmt: skip


@pytest.mark.parametrize(("name", "machine", "depth"), one_in(3, PLACEMENTS))
def test_every_door_says_the_same(name: str, machine: str, depth: int, tmp_path: Path) -> None:
    plan = planned(name, machine, depth)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert not loaded.edited
    found = price(loaded)
    timeline = simulate(loaded)
    doors = {
        "plan": plan.objective_s,
        "price": found.step_s,
        "again": priced(loaded).objective_s,
        "simulate": timeline.step_s,
        "simulate --json": json.loads(json.dumps(timeline.to_json()))["step_s"],
    }
    assert set(doors.values()) == {plan.objective_s}, doors
    assert sensitivity(loaded, num_variants=0)[0].step_s == plan.objective_s  # the report's row
    assert f"predicted step {milliseconds(plan.objective_s)} ms" in loaded.explain()
    assert f"step {milliseconds(plan.objective_s)} ms" in totals(loaded, timeline)[0]
    assert plan.lower_bound_s <= plan.objective_s
    assert not found.misfits
    if machine in PODS:
        assert ipu_doors(name, machine, plan) == {plan.objective_s}


@pytest.mark.parametrize("vocabulary", ["even", "auto", (1, 2)])
@pytest.mark.parametrize("machine", ["a100-80g-x8", "threads"])
def test_a_spread_vocabulary_has_one_price(machine: str, vocabulary: Any, tmp_path: Path) -> None:
    plan = planned("gpt2", machine, 2, vocabulary=vocabulary)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    timeline = simulate(loaded)
    assert loaded == plan
    doors = {plan.objective_s, price(loaded).step_s, priced(loaded).objective_s, timeline.step_s}
    assert doors == {sensitivity(loaded, num_variants=0)[0].step_s}
    assert 0 < plan.lower_bound_s <= plan.objective_s
    assert f"predicted step {milliseconds(plan.objective_s)} ms" in loaded.explain()
    if plan.vocabulary is not None:
        assert "vocabulary ms" in loaded.explain()
        spent = [timeline.seconds[device, "vocabulary"] for device in timeline.devices]
        expected = [plan.num_microbatches * stage.vocabulary_s for stage in plan.stages]
        assert spent == pytest.approx(expected)


@pytest.mark.parametrize(
    ("machine", "field", "value", "message"),
    [
        ("pod4", "schedule", "zbv", "pod4 runs no schedule 'zbv'; use one of popart"),
        ("pod4", "num_microbatches", 2, "needs at least 3 microbatches per step"),
        ("pod4", "replicas", 3, "3 replicas of 2 devices need 6 devices, pod4 has 4"),
        ("a100-80g-x8", "schedule", "popart", "a100-80g-x8 runs no schedule 'popart'"),
        ("threads", "schedule", "zbv", "runs exactly 2 stages per device"),
    ],
)
def test_an_edit_that_the_machine_cannot_run_is_refused(
    machine: str, field: str, value: object, message: str, tmp_path: Path
) -> None:
    planned("bert", machine, 2).save(tmp_path / "plan.json")
    raw = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**raw, field: value}))
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "plan.json")


def ipu_doors(name: str, machine: str, plan: Plan) -> set[float]:
    """Seconds of the configuration that ``emit`` writes: ``plan --ipu-config`` and ``predict``."""
    model, batch = built(name)
    config = IPUConfig.from_dict(ipu_config_of_plan(plan).to_dict())
    again = ipp.plan(model, batch, machine=machine, config=config)
    return {again.objective_s, predict(plan.graph, config, plan.machine).time.total_s}


@pytest.mark.slow
def test_every_command_prints_the_same(tmp_path: Path) -> None:
    config, _ = MODELS["bert"]
    (tmp_path / "model").mkdir()
    config.save_pretrained(tmp_path / "model")
    made, bundle = tmp_path / "plan.json", tmp_path / "bundle"
    model = [str(tmp_path / "model"), "--task", "question-answering", "--seq-length", "64"]
    pod = ["--machine", "pod4", "--micro-batch", "2"]

    def said(*command: str) -> str:
        result = CliRunner().invoke(app, list(command))
        assert result.exit_code == 0, result.output
        return result.output

    text = said("plan", *model, *pod, "--num-stages", "4", "--microbatches", "16", "-o", str(made))
    plan = Plan.load(made)
    shown = f"{milliseconds(plan.objective_s)} ms"
    assert f"predicted step {shown}" in text
    assert f"predicted step {shown}" in said("explain", str(made))
    assert json.loads(said("simulate", str(made), "--json"))["step_s"] == plan.objective_s
    report = said("report", str(made))
    assert f"predicted step {shown}" in report
    row = next(line for line in report.splitlines() if "as planned" in line)
    assert milliseconds(plan.objective_s) in row
    said("emit", str(made), "-o", str(bundle))
    written = ["--ipu-config", str(bundle / "ipu_config.json")]
    assert f"predicted step {shown}" in said("plan", *model, *pod, *written)
    rate = plan.total_batch_size / plan.objective_s
    assert f"{rate:,.1f} samples/s" in said("predict", *model, *pod, *written)


@pytest.mark.slow
def test_a_tuned_plan_has_the_price_that_tune_prints(tmp_path: Path) -> None:
    config, _ = MODELS["bert"]
    config.save_pretrained(tmp_path)
    made, written = tmp_path / "plan.json", tmp_path / "ipu_config.json"
    command = ["tune", str(tmp_path), "--task", "question-answering", "--machine", "pod4"]
    command += ["--global-batch", "64", "--micro-batch", "2", "--seq-length", "64", "--json"]
    result = CliRunner().invoke(
        app, [*command, "-o", str(made), "--ipu-config-output", str(written)]
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)["front"][0]["step_s"]
    plan = Plan.load(made)
    config = IPUConfig.load(written)
    again = ipp.plan(*built("bert"), machine="pod4", config=config, replicas=config.replicas())
    doors = {plan.objective_s, price(plan).step_s, simulate(plan).step_s, again.objective_s}
    assert doors == {printed}
