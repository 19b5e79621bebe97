"""One placement has one price through every door, to the last bit."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from transformers import BertConfig, GPT2Config, LxmertConfig, T5Config, ViTConfig
from typer.testing import CliRunner

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices import predict
from ipu_pipeline.backends.ipu.settings import ipu_config_of_plan
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.cli import app
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.text import milliseconds
from ipu_pipeline.planner.price import price, priced
from ipu_pipeline.planner.report.sensitivity import sensitivity
from ipu_pipeline.planner.report.text import totals
from ipu_pipeline.planner.schedules.simulate import simulate

MODELS = {
    "bert": (BertConfig(num_hidden_layers=6, hidden_size=256, num_attention_heads=4,
                        intermediate_size=1024), "question-answering"),
    "lxmert": (LxmertConfig(l_layers=2, x_layers=2, r_layers=2, hidden_size=256,
                            num_attention_heads=4, intermediate_size=1024), "visual-qa"),
    "gpt2": (GPT2Config(n_layer=6, n_embd=256, n_head=4, vocab_size=8192), "causal-lm"),
    "t5": (T5Config(num_layers=3, d_model=256, d_kv=64, d_ff=1024, num_heads=4,
                    vocab_size=8192), "translation"),
    "vit": (ViTConfig(num_hidden_layers=6, hidden_size=256, num_attention_heads=4,
                      intermediate_size=1024, num_labels=10), "image-classification"),
}  # fmt: skip
PODS = ("pod4", "pod16", "bow-pod16")
PLACEMENTS = list(product(MODELS, (*PODS, "a100-80g-x8", "threads"), (2, 4)))[:50]


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


@pytest.mark.parametrize(("name", "machine", "depth"), PLACEMENTS)
def test_every_door_says_the_same(name: str, machine: str, depth: int, tmp_path: Path) -> None:
    plan = planned(name, machine, depth)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert not loaded.edited
    found = price(loaded)
    timeline = simulate(loaded)
    own = sensitivity.__wrapped__(loaded) if hasattr(sensitivity, "__wrapped__") else None
    assert own is None
    doors = {
        "plan": plan.objective_s,
        "price": found.step_s,
        "again": priced(loaded).objective_s,
        "simulate": timeline.step_s,
        "simulate --json": json.loads(json.dumps(timeline.to_json()))["step_s"],
    }
    assert set(doors.values()) == {plan.objective_s}, doors
    assert f"predicted step {milliseconds(plan.objective_s)} ms" in loaded.explain()
    assert f"step {milliseconds(plan.objective_s)} ms" in totals(loaded, timeline)[0]
    assert plan.lower_bound_s <= plan.objective_s
    assert not found.misfits
    if machine in PODS:
        assert ipu_doors(name, machine, plan) == {plan.objective_s}


def ipu_doors(name: str, machine: str, plan: Plan) -> set[float]:
    """Seconds of the configuration that ``emit`` writes: ``plan --ipu-config`` and ``predict``."""
    model, batch = built(name)
    config = IPUConfig.from_dict(ipu_config_of_plan(plan).to_dict())
    again = ipp.plan(model, batch, machine=machine, config=config)
    return {again.objective_s, predict(plan.graph, config, plan.machine).time.total_s}
