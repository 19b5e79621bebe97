"""Plans for IPU machines take their prices from the IPU model."""

from __future__ import annotations

from transformers import BertConfig

import ipu_pipeline as ipp
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.ir.machine import Device, Link, Machine

TINY = BertConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128,
    vocab_size=512,
)  # fmt: skip


def _plan(machine: str | Machine, config: ipp.IPUConfig | None = None):
    model, batch = from_config(TINY, "question-answering", batch_size=2, seq_length=32)
    return ipp.plan(model, batch, machine=machine, num_stages=2, microbatches=4, config=config)


def test_a_pod_is_priced_by_the_ipu_model() -> None:
    plan = _plan("bow-pod4")
    assert plan.cost_source == "ipu"
    assert plan.machine.devices[0].kind == "ipu-bow"
    assert plan.objective_s > 0


def test_other_machines_keep_the_analytic_model() -> None:
    device = Device("d", 10**9, {"float32": 1e12}, 1e11)
    assert _plan(Machine("two", (device, device), Link(1e9))).cost_source == "analytic"


def test_a_configuration_sets_the_prices() -> None:
    on_chip, away = (
        _plan("pod4", ipp.IPUConfig(layers_per_ipu=(1, 2), optimizer_state_offchip=offchip))
        for offchip in (False, True)
    )
    weights = [plan.stages[0].weight_bytes for plan in (on_chip, away)]
    assert weights[0] == 3 * weights[1]  # 2 + 2 + 8 bytes, or 2 + 2
