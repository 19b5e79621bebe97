from __future__ import annotations

import pytest

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.planner.tuning.space import TuneRequest, settings_of, shapes
from tests.backends.ipu.prices.ipu_graphs import layered


def test_every_shape_is_the_whole_batch_on_the_pod() -> None:
    found = shapes(TuneRequest(256), 16)
    assert all(s.micro_batch * s.accumulation * s.replicas == 256 for s in found)
    assert all(s.num_ipus * s.replicas <= 16 for s in found)
    assert all(s.accumulation >= 2 * s.num_ipus - 1 for s in found)
    assert {s.num_ipus for s in found} == {1, 2, 4, 8, 16}


def test_pins_are_kept() -> None:
    found = shapes(TuneRequest(256, micro_batch=4, ipus_per_replica=8, replicas=2), 16)
    assert [(s.num_ipus, s.replicas, s.accumulation) for s in found] == [(8, 2, 32)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (TuneRequest(7, micro_batch=2), r"batch of 7: it must be a multiple of 2 .* are 6 and 8"),
        (TuneRequest(28, ipus_per_replica=8, replicas=2), r"at least 30 .* needs 15 microbatches"),
        (TuneRequest(8, ipus_per_replica=32), r"1 replicas of 32 IPUs need 32, the pod has 16"),
    ],
)
def test_impossible_batches_say_what_would_work(asked: TuneRequest, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        shapes(asked, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 0}, "global_batch must be at least 1, got 0"),
        ({"replicas": 0}, "replicas must be at least 1, got 0"),
        ({"least_free": 1.0}, "least_free must be at least 0 and below 1, got 1.0"),
        ({"proportions": ()}, "must each hold at least one value"),
    ],
)
def test_wrong_requests_are_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuneRequest(**{"global_batch": 8, **changes})


def test_slices_are_tried_for_large_tables_only() -> None:
    shape = shapes(TuneRequest(16, ipus_per_replica=2, replicas=1, micro_batch=1), 4)[0]
    graph = layered(tied=False)
    found = list(settings_of(shape, graph, TuneRequest(16, optimizer="sgd")))
    assert {s.embedding_factor for s in found} == {1, 2, 4}
    assert not any(s.optimizer_offchip for s in found), "sgd has no state to move"
    assert not any(s.sharded for s in found), "one replica has nobody to share with"
