from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.backends.ipu.prices import IPUSettings, chip_named
from ipu_pipeline.backends.ipu.prices.layout import PlacedProgram, make_layout, one_ipu_groups
from ipu_pipeline.errors import ConfigError
from ipu_pipeline.ir.graph import ParameterSpec
from tests.backends.ipu.prices.ipu_graphs import VOCAB, layered

CHIP = chip_named("ipu-gc200")


def _settings(*layers: int, **more) -> IPUSettings:
    return IPUSettings(num_ipus=len(layers), layers_per_ipu=layers, accumulation=32, **more)


def _stages(layout) -> list[tuple[int, int]]:
    return [(stage.ipu, len(stage.blocks)) for stage in layout.stages]


def test_a_tied_head_goes_back_to_the_embedding() -> None:
    # README of the shared data: [3,7,7,7] and [0,4,4,4] have F = 5 on 4 IPUs
    layout = make_layout(layered(4), _settings(0, 1, 1, 2))
    assert _stages(layout) == [(0, 1), (1, 1), (2, 1), (3, 2), (0, 2)]


def test_blocks_that_follow_each_other_on_an_ipu_share_a_stage() -> None:
    layout = make_layout(layered(4), _settings(1, 1, 2))
    assert _stages(layout) == [(0, 2), (1, 1), (2, 2), (0, 2)]


def test_an_untied_head_is_on_the_last_ipu() -> None:
    layout = make_layout(layered(4, tied=False), _settings(0, 2, 2, 0))
    assert _stages(layout) == [(0, 1), (1, 2), (2, 2), (3, 2)]


def test_the_published_head_ipu_counts() -> None:
    layout = make_layout(layered(4, tied=False), _settings(0, 2, 2, head_ipu=0))
    assert _stages(layout) == [(0, 1), (1, 2), (2, 2), (0, 2)]


def test_wildcards_share_the_layers() -> None:
    layout = make_layout(layered(5), _settings(0, -1, -1))
    assert _stages(layout) == [(0, 1), (1, 2), (2, 3), (0, 2)]


def test_one_ipu_is_one_stage() -> None:
    layout = make_layout(layered(3), _settings(-1))
    assert _stages(layout) == [(0, 6)]


def test_layers_may_be_placed_one_by_one() -> None:
    placed = {"layer.0": 1, "layer.1": 1, "layer.2": 2}
    layout = make_layout(layered(3), _settings(0, 0, 0), placed)
    assert _stages(layout) == [(0, 1), (1, 2), (2, 1), (0, 2)]


def test_a_placement_outside_the_replica_is_refused() -> None:
    with pytest.raises(ConfigError, match="IPU 5, but a replica has 3"):
        make_layout(layered(1), _settings(0, 0, 1), {"layer.0": 5})


def test_counts_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ConfigError, match="places 4 layers, the model has 3"):
        make_layout(layered(3), _settings(2, 2))


def test_crossing_tensors() -> None:
    layout = make_layout(layered(2), _settings(0, 1, 1))
    crossing = PlacedProgram(layered(2), layout, _settings(0, 1, 1), CHIP).crossing
    assert crossing == ((0, 1, "h"), (1, 2, "h0"), (2, 3, "h1"))


def test_a_tied_table_is_held_once() -> None:
    graph, settings = layered(2), _settings(0, 1, 1)
    held = PlacedProgram(graph, make_layout(graph, settings), settings, CHIP).held
    assert held == ({"wte": VOCAB * 256}, {"layer.0.weight": 256**2}, {"layer.1.weight": 256**2})


def test_a_module_that_layers_hold_is_on_one_ipu() -> None:
    graph = layered(2, tied=False)

    def shared(fqn: str, *aliases: str) -> tuple[tuple[str, ...], ...]:
        one = ParameterSpec(fqn, (4,), "float32", aliases=aliases, blocks=("layer.0", "layer.1"))
        return one_ipu_groups(replace(graph, parameters=(*graph.parameters, one)))

    assert shared("layer.0.both.weight", "layer.1.both.weight") == (("layer.0", "layer.1"),)
    assert shared("relative.weight") == ()  # handed to the layers as a value
    assert one_ipu_groups(layered(2)) == (("wte", "head"),)
    # embedding and head in the glue of layers
    layers = tuple(replace(block, kind="layer") for block in layered(2).blocks)
    assert one_ipu_groups(replace(layered(2), blocks=layers)) == (("wte", "head"),)
