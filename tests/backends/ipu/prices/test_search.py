"""The search over IPU pipelines against trying everything, priced by the predictor itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.prices import (
    Chip,
    IPUPlanning,
    IPUSettings,
    Prediction,
    ProgramChoices,
    chip_named,
)
from ipu_pipeline.backends.ipu.prices.chain import ChainPrices, openers
from ipu_pipeline.backends.ipu.prices.layout import layout_of, make_layout
from ipu_pipeline.backends.ipu.prices.pipeline import IPUPipeline
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.planner.search import Constraints, InfeasibleError
from tests.backends.ipu.prices.ipu_graphs import layered
from tests.tiny_models import TINY

POD = machine_by_name("pod4")
CHOICES = ProgramChoices(
    embedding_factors=(1,), projection_factors=(1, 2), offchip=(False, True),
    proportions=(0.05, 0.3),
)  # fmt: skip
SETTINGS = IPUSettings(num_ipus=1, sharded=True)
ASKED = Constraints(num_microbatches=9, schedule="popart", time_limit_s=None)


def small_chip(share: float) -> Chip:
    """A chip with a part of the memory, so that memory decides."""
    chip = chip_named("ipu-gc200")
    return replace(chip, tile_memory_bytes=int(chip.tile_memory_bytes * share))


def planning(graph: BlockGraph, share: float = 1.0, **choices) -> IPUPlanning:
    chain = ChainPrices(graph, small_chip(share))
    settings = replace(SETTINGS, training=graph.training)
    return IPUPlanning(chain, settings, replace(CHOICES, **choices))


def splits(item: IPUPipeline) -> Iterator[list[tuple[int, Sequence[str]]]]:
    names = item.chain.names
    for cuts in combinations(item.starts[1:-1], len(item.slots) - 1):
        ends = [0, *cuts, len(names)]
        yield [(ipu, names[a:b]) for ipu, (a, b) in zip(item.devices, pairwise(ends), strict=True)]


def tied_apart(graph: BlockGraph, stages: list[tuple[int, Sequence[str]]]) -> bool:
    home = {name: ipu for ipu, names in stages for name in names}
    return any(len({home[name] for name in group}) > 1 for group in graph.tied_groups)


def everything(found: IPUPlanning, constraints: Constraints) -> Iterator[Prediction]:
    """Every pipeline, program, split and memory proportion that fits."""
    for item in found.pipelines(POD, constraints):
        for stages in splits(item):
            if tied_apart(found.graph, stages):
                continue
            for chosen in product(CHOICES.proportions, repeat=item.settings.num_ipus):
                layout = layout_of(stages, item.settings.num_ipus)
                settings = replace(item.settings, proportions=chosen)
                priced = Prediction(found.graph, layout, settings, found.chain.chip)
                if priced.fits:
                    yield priced


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("memory", [1.0, 0.14, 0.115, 0.1])
@pytest.mark.parametrize("ipus", [2, 4])
def test_the_quickest_of_all(tied: bool, memory: float, ipus: int) -> None:
    found = planning(layered(3, seq=256, tied=tied), memory)
    asked = replace(ASKED, num_stages=ipus)
    brute = min((p.time.total_s for p in everything(found, asked)), default=None)
    if brute is None:
        with pytest.raises(InfeasibleError):
            found.search(POD, asked)
        return
    best = found.search(POD, asked)
    assert best.objective == brute
    assert best.lower_bound <= best.objective
    assert best.gap < 0.02  # copies of two boundaries over one link are bounded, not added up


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_bounds_hold(tied: bool) -> None:
    graph = layered(3, seq=256, tied=tied)
    found = planning(graph)
    asked = replace(ASKED, num_stages=4)
    for item in found.pipelines(POD, asked):
        assert item.quick_bound_s <= item.bound_s() * (1 + 1e-12)
        for stages in splits(item):
            settings = replace(item.settings, proportions=(0.3,) * item.settings.num_ipus)
            layout = layout_of(stages, settings.num_ipus)
            time = Prediction(graph, layout, settings, found.chain.chip).time
            assert item.bound_s() <= time.total_s * (1 + 1e-12)


def test_rows_are_the_step_itself() -> None:
    """Without shared links and shared parameters the search minimises the price, not a bound."""
    found = planning(layered(3, seq=256, tied=False))
    best = found.search(POD, replace(ASKED, num_stages=4))
    assert best is not None
    assert best.gap < 1e-12


def test_inference() -> None:
    found = planning(layered(3, seq=256, tied=False, training=False), offchip=(False,))
    best = found.search(POD, replace(ASKED, num_stages=2))
    brute = min(p.time.total_s for p in everything(found, replace(ASKED, num_stages=2)))
    assert best is not None
    assert best.objective == brute


def test_settings_say_the_placement() -> None:
    graph = layered(3, seq=256)
    found = planning(graph)
    best = found.search(POD, replace(ASKED, num_stages=2))
    assert best is not None
    settings = IPUSettings.from_json(dict(best.settings))
    layout = make_layout(graph, settings)
    assert tuple(stage.blocks for stage in layout.stages) == best.blocks
    assert tuple(stage.ipu for stage in layout.stages) == best.devices
    again = Prediction(graph, layout, settings, found.chain.chip)
    assert again.time.total_s == best.objective
    read = IPUSettings.from_config(settings.ipu_config())
    assert Prediction(graph, make_layout(graph, read), read, found.chain.chip) == again


def test_a_stage_begins_with_a_modules_call() -> None:
    graph = layered(3)
    assert list(openers(graph)) == [0, 1, 2, 3, 4]  # never the loss
    names = {"layer.1": "shared#1", "layer.2": "shared#2"}
    blocks = tuple(replace(b, name=names.get(b.name, b.name)) for b in graph.blocks)
    assert list(openers(replace(graph, blocks=blocks))) == [0, 1, 2, 4]


def test_slices_divide_the_table() -> None:
    found = planning(layered(2), embedding_factors=(1, 3), projection_factors=(1, 2, 3, 5))
    programs = {
        (i.settings.embedding_factor, i.settings.projection_factor)
        for i in found.pipelines(POD, replace(ASKED, num_stages=2))
    }
    assert programs == {(1, 1), (1, 2)}


def test_what_does_not_fit_says_what_would() -> None:
    found = planning(layered(3, tied=False), 0.115, offchip=(False,), proportions=())
    asked = replace(ASKED, num_stages=2)
    with pytest.raises(InfeasibleError, match=r"no split fits pod4: spread evenly over 2 IPUs, .*"):
        found.search(POD, asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_microbatches": 2}, "PopART needs at least 3 microbatches"),
        ({"num_stages": 4, "forbidden_cuts": ("layer.0", "layer.1")}, "4 stages need as many"),
        ({"replicas": 8}, "no pipeline to try: 8 replicas"),
        ({"serialize": {"head": 3}}, "its table has 8192 rows, which 3 does not divide"),
        (
            {"serialize": {"loss": 3}},
            "'loss' is to run in 3 slices, but it has no table; leave it whole",
        ),
    ],
)
def test_nothing_to_try(change: dict[str, object], message: str) -> None:
    found = planning(layered(2, tied=False))
    with pytest.raises(PartitionError, match=message):
        found.search(POD, replace(ASKED, **{"num_stages": 2, **change}))


def test_tied_tables_bring_the_pipeline_back_to_their_ipu() -> None:
    """Two IPUs get three stages, and so many need more microbatches than two."""
    model, batch = TINY["gpt2-lm"].build()
    with pytest.raises(
        PartitionError, match="5 microbatches per step for the 3 stages that 2 IPUs"
    ):
        ipp.plan(model, batch, machine="pod4", num_stages=2, microbatches=4)
