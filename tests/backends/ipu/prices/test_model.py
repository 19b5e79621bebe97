from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.backends.ipu.prices import IPUPlanning, IPUSettings
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.machines import machine_by_name
from tests.backends.ipu.prices.ipu_graphs import VOCAB, layered

POD = machine_by_name("pod4")
GRAPH = layered(6)


def costs_of(graph=GRAPH, machine=POD, **settings):
    run = IPUSettings(num_ipus=1, **settings)
    return IPUPlanning.of(graph, machine, run).costs(machine)


COSTS = costs_of()


def test_every_block_is_priced() -> None:
    assert set(COSTS.blocks) == {block.name for block in GRAPH.blocks}
    assert COSTS.source == "ipu"
    assert COSTS.device_speed == (1.0,) * 4


def test_weights_accumulators_and_state() -> None:
    on_chip = costs_of()
    assert on_chip.blocks["wte"].weight_bytes == {"wte": VOCAB * 256 * (2 + 2 + 8)}
    away = costs_of(optimizer_offchip=True)
    assert away.blocks["wte"].weight_bytes == {"wte": VOCAB * 256 * 4}


def test_inference_has_no_backward() -> None:
    costs = costs_of(replace(GRAPH, training=False))
    assert all(cost.plain.backward_s == 0 for cost in costs.blocks.values())


def test_other_machines_are_refused() -> None:
    with pytest.raises(PlanError, match="the IPU model prices pod4"):
        costs_of(machine=machine_by_name("a100-80g-x8"))
