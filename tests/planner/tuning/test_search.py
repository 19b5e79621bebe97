from __future__ import annotations

import pytest

from ipu_pipeline.planner.tuning.search import FREE_STEP, free_share, search
from tests.planner.tuning.grids import everything, graphs, prepared, request, shared, small_chip


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("alike", [False, True], ids=["layers differ", "layers alike"])
@pytest.mark.parametrize("memory", [1.0, 0.14, 0.11])
def test_every_point_is_the_best_of_all(tied: bool, alike: bool, memory: float) -> None:
    """At every level of free memory: as quick as trying every setting, split and proportion."""
    asked, chip = request(), small_chip(memory)
    models = {n: shared(g) if alike else g for n, g in graphs(tied=tied).items()}
    found = search(prepared(asked, models, chip), asked, time_limit_s=1000)
    brute = [(p.samples_per_s, free_share(p)) for p in everything(asked, models, chip)]
    assert found.complete
    assert bool(found.points) == bool(brute)
    if not brute:
        return
    assert found.points[0].samples_per_s == pytest.approx(max(rate for rate, _ in brute))
    for before, point in zip(found.points, found.points[1:], strict=False):
        most = max(rate for rate, free in brute if free >= before.free + FREE_STEP)
        assert point.samples_per_s == pytest.approx(most)
    assert all(p.bound_s == p.prediction.time.total_s for p in found.points)


def test_no_point_dominates_another() -> None:
    asked = request()
    found = search(prepared(asked, graphs(tied=True), small_chip(0.2)), asked, time_limit_s=1000)
    assert len(found.points) > 1
    for one in found.points:
        assert one.prediction.fits
        assert not any(
            other.samples_per_s >= one.samples_per_s and other.free >= one.free
            for other in found.points
            if other is not one
        )


def test_bounds_never_exceed_what_is_found() -> None:
    asked, chip = request(), small_chip(1.0)
    for tied in (False, True):
        models = graphs(tied=tied)
        items = prepared(asked, models, chip)
        for prediction in everything(asked, models, chip):
            item = next(
                c for c in items
                if c.settings.num_ipus == prediction.settings.num_ipus
                and c.settings.replicas == prediction.settings.replicas
                and c.shape.micro_batch == prediction.micro_batch
                and c.settings.optimizer_offchip == prediction.settings.optimizer_offchip
            )  # fmt: skip
            assert item.bound_s <= prediction.time.total_s * (1 + 1e-12)


def test_least_free_is_kept() -> None:
    asked = request(least_free=0.5)
    found = search(prepared(asked, graphs(tied=False), small_chip(1.0)), asked)
    assert all(point.free >= 0.5 for point in found.points)


def test_time_limit_keeps_the_quickest() -> None:
    asked = request()
    items = prepared(asked, graphs(tied=True), small_chip(0.2))
    found = search(items, asked, time_limit_s=0.0)
    assert len(found.points) == 1
    assert not found.complete
