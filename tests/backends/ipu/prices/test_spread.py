"""Shares of a table as blocks: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import pytest
import transformers

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.prices import predict
from ipu_pipeline.backends.ipu.prices.chip import chip_named
from ipu_pipeline.backends.ipu.prices.layout import PlacedProgram, make_layout
from ipu_pipeline.backends.ipu.prices.memory import ipu_memory
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.spread import spread_tables
from ipu_pipeline.backends.ipu.prices.timing import stage_times
from ipu_pipeline.backends.ipu.settings import ipu_config_of_plan
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.errors import ConfigError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.search.infeasible import InfeasibleError
from tests.backends.ipu.prices.ipu_graphs import VOCAB, layered

HIDDEN, TOKENS = 256, 4 * 128
CHIP = chip_named("ipu-bow")


def _run(**splits: tuple[int, ...]) -> IPUSettings:
    return IPUSettings(
        num_ipus=3, layers_per_ipu=(0, 2, 2), accumulation=32, proportions=(0.2,) * 3,
        embedding_factor=4, projection_factor=4, **splits,
    )  # fmt: skip


def _flops(graph: BlockGraph) -> tuple[int, int]:
    return tuple(
        sum(getattr(block, way) for block in graph.blocks)
        for way in ("forward_flops", "backward_flops")
    )


def test_shares_of_a_tied_table() -> None:
    graph, run = layered(), _run(embedding_splits=(1, 3, 0))
    found = spread_tables(graph, run)
    quarter = VOCAB // 4
    names = [f"{whole}[{rows}]" for whole in ("wte", "head") for rows in
             (f"0:{quarter}", f"{quarter}:{VOCAB}")]  # fmt: skip
    assert [block.name for block in found.blocks if "[" in block.name] == names
    assert found.tied_groups == ((names[0], names[2]), (names[1], names[3]))
    # the products are the same, and a sum of two lookups is new
    forward, backward = _flops(graph)
    assert _flops(found) == (forward + TOKENS * HIDDEN, backward)
    assert sum(p.numel for p in found.parameters) == sum(p.numel for p in graph.parameters)
    layout = make_layout(found, run)
    assert [stage.ipu for stage in layout.stages] == [0, 1, 2, 0, 1]
    placed = PlacedProgram(found, layout, run, CHIP)
    weights = [memory.weights // 2 for memory in ipu_memory(placed)]
    square = HIDDEN * HIDDEN
    assert weights == [quarter * HIDDEN, 3 * quarter * HIDDEN + 2 * square, 2 * square]
    # hidden states and the first logits go on to the second share
    assert (3, 4, "head.hidden") in placed.crossing
    assert (3, 4, "head[0:2048].part") in placed.crossing
    assert (0, 1, "wte[0:2048].sum") in placed.crossing
    assert spread_tables(found, run) is found  # a graph is spread once


def test_slices_of_shares_take_as_long_as_those_of_the_whole() -> None:
    graph, run = layered(tied=False), _run(projection_splits=(0, 2, 2))
    found = spread_tables(graph, run)
    whole = PlacedProgram(graph, make_layout(graph, _run()), _run(), CHIP)
    parts = PlacedProgram(found, make_layout(found, run), run, CHIP)
    assert [stage.ipu for stage in parts.layout.stages] == [0, 1, 2, 1, 2]
    last = stage_times(whole)[-1]
    first, second = stage_times(parts)[-2:]
    layers = stage_times(parts)[2]  # two layers, which the whole head shares its stage with
    joined = PlacedProgram(found, parts.layout, run, CHIP).pricer(2).moved_cycles(
        2 * TOKENS * VOCAB * 2 / 2
    ) * CHIP.calibration.poptorch_factor / CHIP.clock_hz  # fmt: skip
    forward = first.forward_s + second.forward_s + layers.forward_s
    assert forward == pytest.approx(last.forward_s + joined, rel=0.02)
    assert first.backward_s + second.backward_s + layers.backward_s == pytest.approx(
        last.backward_s, rel=0.02
    )


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"embedding_splits": (1, 2, 0)}, "in 3 slices, but its table has 8192 rows"),
        (
            {"embedding_splits": (1, 1, 0), "projection_splits": (2, 2, 0)},
            r"share 'wte', .*projection_splits_per_ipu=\[2, 2, 0\] and the embedding's are \[1, 1",
        ),
    ],
)
def test_splits_that_cannot_be(splits: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spread_tables(layered(), _run(**splits))


def test_other_shares_than_those_of_the_graph() -> None:
    found = spread_tables(layered(), _run(embedding_splits=(2, 2, 0)))
    with pytest.raises(ConfigError, match=r"rows 0 to 4095, 4096 to 8191, and its splits .*same"):
        spread_tables(found, _run(embedding_splits=(1, 3, 0)))
    # evaluation may have all of them on one IPU
    assert spread_tables(found, _run()) is found


def _planned(vocabulary: str | None) -> Plan:
    config = transformers.GPT2Config(vocab_size=131072, n_embd=768, n_layer=1, n_positions=32)
    model, batch = from_config(config, "causal-lm", batch_size=1, seq_length=32)
    return ipp.plan(
        model, batch, machine="pod4", num_stages=4, microbatches=16, vocabulary=vocabulary
    )


def test_the_planner_spreads_a_table_that_no_ipu_holds() -> None:
    plan = _planned("even")
    assert plan.vocabulary is None
    held = [stage for stage in plan.stages if any("wte[" in name for name in stage.blocks)]
    assert len({stage.device for stage in held}) > 1
    # what is written says it, and its price is the plan's
    found = ipu_config_of_plan(plan)
    assert sum(found.serialized_embedding_splits_per_ipu) in (2, 4, 8)
    assert predict(plan.graph, found, plan.machine).time.total_s == plan.objective_s


@pytest.mark.acceptance
def test_what_does_not_fit_is_said_to_fit_spread() -> None:
    with pytest.raises(InfeasibleError, match="spread the tables over IPUs"):
        _planned(None)
