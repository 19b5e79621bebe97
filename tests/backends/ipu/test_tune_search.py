"""The tuner against trying everything, on small models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest

from ipu_pipeline.backends.ipu.prices import Chip, Prediction, ProgramChoices, chip_named
from ipu_pipeline.backends.ipu.prices.layout import layout_of
from ipu_pipeline.backends.ipu.prices.pipeline import IPUPipeline
from ipu_pipeline.backends.ipu.tune import (
    CHOICES,
    FREE_STEP,
    SETTINGS,
    TuneRequest,
    batch_divisions,
    front_of,
    pipelines_of,
)
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machines import machine_by_name
from tests.backends.ipu.prices.ipu_graphs import layered

NUM_IPUS, NUM_LAYERS = 4, 3
POD = machine_by_name("pod4")


def request_of(**changes) -> TuneRequest:
    choices = replace(
        CHOICES, proportions=(0.05, 0.3), embedding_factors=(1,), projection_factors=(1,)
    )
    return TuneRequest(16, choices=choices, max_micro_batch=2, **changes)


def graphs(*, tied: bool) -> dict[int, BlockGraph]:
    return {size: layered(NUM_LAYERS, batch=size, seq=256, tied=tied) for size in (1, 2)}


def small_chip(share: float) -> Chip:
    """A chip with a part of the memory, so that memory decides."""
    chip = chip_named("ipu-gc200")
    return replace(chip, tile_memory_bytes=int(chip.tile_memory_bytes * share))


def prepared(asked: TuneRequest, models: dict[int, BlockGraph], chip: Chip) -> list[IPUPipeline]:
    return pipelines_of(batch_divisions(asked, NUM_IPUS), models, POD, asked, chip)


def everything(pipelines: list[IPUPipeline]) -> Iterator[tuple[IPUPipeline, Prediction]]:
    """Predict every split and proportion of every pipeline that fits."""
    for item in pipelines:
        names, graph, chip = item.chain.names, item.chain.graph, item.chain.chip
        for cuts in combinations(item.starts[1:-1], len(item.slots) - 1):
            ends = pairwise([0, *cuts, len(names)])
            stages = [(ipu, names[a:b]) for ipu, (a, b) in zip(item.devices, ends, strict=True)]
            home = {name: ipu for ipu, blocks in stages for name in blocks}
            if any(len({home[name] for name in group}) > 1 for group in graph.tied_groups):
                continue
            for chosen in product((0.05, 0.3), repeat=item.settings.num_ipus):
                settings = replace(item.settings, proportions=chosen)
                layout = layout_of(stages, settings.num_ipus)
                found = Prediction(graph, layout, settings, chip)
                assert not [note for note in found.notes if "refuses" in note]
                if found.fits:
                    yield item, found


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("memory", [1.0, 0.14, 0.11])
def test_every_point_is_the_best_of_all(tied: bool, memory: float) -> None:
    """At every level of free memory: as quick as trying every setting, split and proportion."""
    asked, chip = request_of(), small_chip(memory)
    pipelines = prepared(asked, graphs(tied=tied), chip)
    found = front_of(pipelines, asked, time_limit_s=1000)
    brute = [(p.samples_per_s, p.free) for _, p in everything(pipelines)]
    assert found.complete
    assert bool(found.points) == bool(brute)
    if not brute:
        return
    assert found.points[0].samples_per_s == pytest.approx(max(rate for rate, _ in brute))
    for before, point in pairwise(found.points):
        most = max(rate for rate, free in brute if free >= before.free + FREE_STEP)
        assert point.samples_per_s == pytest.approx(most)
    assert all(p.bound_s <= p.prediction.time.total_s for p in found.points)


def test_no_point_dominates_another() -> None:
    asked = request_of()
    found = front_of(prepared(asked, graphs(tied=True), small_chip(0.2)), asked, time_limit_s=1000)
    assert len(found.points) > 1
    for one, other in pairwise(found.points):
        assert one.prediction.fits
        assert one.samples_per_s > other.samples_per_s
        assert one.free < other.free


def test_least_free_is_kept() -> None:
    asked = request_of(least_free=0.5)
    found = front_of(prepared(asked, graphs(tied=False), small_chip(1.0)), asked)
    assert found.points
    assert all(point.free >= 0.5 for point in found.points)


def test_time_limit_keeps_the_quickest() -> None:
    asked = request_of()
    items = prepared(asked, graphs(tied=True), small_chip(0.2))
    found = front_of(items, asked, time_limit_s=0.0)
    assert len(found.points) == 1
    assert not found.complete


def test_every_division_is_the_whole_batch_on_the_pod() -> None:
    found = batch_divisions(TuneRequest(256), 16)
    assert all(d.micro_batch * d.accumulation * d.replicas == 256 for d in found)
    assert all(d.num_ipus * d.replicas <= 16 for d in found)
    assert all(d.accumulation >= 2 * d.num_ipus - 1 for d in found)
    assert {d.num_ipus for d in found} == {1, 2, 4, 8, 16}


def test_pins_are_kept() -> None:
    found = batch_divisions(TuneRequest(256, micro_batch=4, ipus_per_replica=8, replicas=2), 16)
    assert [(d.num_ipus, d.replicas, d.accumulation) for d in found] == [(8, 2, 32)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (TuneRequest(7, micro_batch=2), r"batch of 7: it must be a multiple of 2 .* are 6 and 8"),
        (TuneRequest(28, ipus_per_replica=8, replicas=2), r"at least 30 .* needs 15 microbatches"),
        (TuneRequest(8, ipus_per_replica=32), r"1 replica of 32 IPUs need 32, the pod has 16"),
    ],
)
def test_impossible_batches_say_what_would_work(asked: TuneRequest, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        batch_divisions(asked, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 0}, "global_batch must be at least 1, got 0"),
        ({"replicas": 0}, "replicas must be at least 1, got 0"),
        ({"least_free": 1.0}, "least_free must be at least 0 and below 1, got 1.0"),
        ({"choices": ProgramChoices()}, "choices.proportions must hold at least one value"),
    ],
)
def test_wrong_requests_are_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuneRequest(**{"global_batch": 8, **changes})


def test_slices_are_tried_for_large_tables_only() -> None:
    asked = TuneRequest(16, 1, 2, 1, replace(SETTINGS, optimizer="sgd"))
    found = [item.settings for item in prepared(asked, graphs(tied=False), small_chip(1.0))]
    assert {s.embedding_factor for s in found} == {1, 2, 4}
    assert not any(s.optimizer_offchip for s in found), "sgd has no state to move"
    assert not any(s.sharded for s in found), "one replica has nobody to share with"
