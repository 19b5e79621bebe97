from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.backends.ipu.prices import IPUCostModel, IPUSettings
from ipu_pipeline.backends.ipu.prices.memory import FULLEST_TILE
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.planner.search import Constraints, solve
from tests.backends.ipu.prices.ipu_graphs import VOCAB, layered

POD = machine_by_name("pod4")
GRAPH = layered(6)
COSTS = IPUCostModel().estimate(GRAPH, POD)


def test_every_block_is_priced() -> None:
    assert set(COSTS.blocks) == {block.name for block in GRAPH.blocks}
    assert COSTS.source == "ipu"
    assert COSTS.device_speed == (1.0,) * 4


def test_layers_may_recompute() -> None:
    plain, again = COSTS.blocks["layer.0"].choices
    assert not plain.recompute
    assert again.recompute
    assert again.backward_s == pytest.approx(plain.backward_s + plain.forward_s)
    assert again.stash_bytes < plain.stash_bytes
    assert again.workspace_bytes == pytest.approx(plain.workspace_bytes + plain.stash_bytes, abs=2)


def test_tables_may_be_serialized() -> None:
    for name in ("wte", "head"):
        choices = COSTS.blocks[name].choices
        factors = [choice.serialize_factor for choice in choices if not choice.recompute]
        assert factors == [1, 2, 4, 8]
    projection = [c for c in COSTS.blocks["head"].choices if not c.recompute]
    memory = [choice.workspace_bytes for choice in projection]
    assert memory == sorted(memory, reverse=True)
    assert projection[-1].total_s > projection[0].total_s
    assert [c.serialize_factor for c in COSTS.blocks["layer.0"].choices] == [1, 1]


def test_weights_are_those_of_the_fullest_tile() -> None:
    assert COSTS.blocks["wte"].weight_bytes == {
        "wte": int(VOCAB * 256 * (2 + 2 + 8) * FULLEST_TILE)
    }
    away = IPUCostModel(IPUSettings(num_ipus=1, accumulation=2, optimizer_offchip=True))
    found = away.estimate(GRAPH, POD).blocks["wte"].weight_bytes
    assert found == {"wte": int(VOCAB * 256 * 4 * FULLEST_TILE)}


def test_inference_has_no_backward() -> None:
    costs = IPUCostModel().estimate(replace(GRAPH, training=False), POD)
    for cost in costs.blocks.values():
        assert all(choice.backward_s == 0 and not choice.recompute for choice in cost.choices)


def test_the_solver_takes_the_prices() -> None:
    found = solve(GRAPH, COSTS, POD, Constraints(num_stages=3, num_microbatches=8, schedule="1f1b"))
    assert len(found.stages) == 3
    assert found.objective > 0


def test_other_machines_are_refused() -> None:
    with pytest.raises(PlanError, match="the IPU model prices pod4"):
        IPUCostModel().estimate(GRAPH, machine_by_name("a100-80g-x8"))
