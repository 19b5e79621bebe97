"""What ranks tell each other through the store."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from ipu_pipeline.backends.cluster.ranks.heartbeat import Activity
from ipu_pipeline.backends.cluster.ranks.rendezvous import StoreGather
from ipu_pipeline.backends.cluster.ranks.waiting import GivenUp, Waiter


def test_every_rank_gets_all_values_in_order() -> None:
    store, waiter = dist.HashStore(), Waiter(Activity(), lambda: False)
    found: dict[int, list[list[int]]] = {}

    def exchange(rank: int) -> None:
        ranks = StoreGather(store, rank, 3, waiter)
        found[rank] = [ranks.gather(10 * number + rank) for number in range(4)]

    threads = [threading.Thread(target=exchange, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        found[rank] == [[10 * n, 10 * n + 1, 10 * n + 2] for n in range(4)] for rank in found
    )
    assert store.num_keys() == 3  # those of the last exchange


def test_waiting_ends_when_a_rank_has_failed() -> None:
    waiter = Waiter(Activity(), lambda: True)
    ranks = StoreGather(dist.HashStore(), 0, 2, waiter)
    with pytest.raises(GivenUp, match="another rank has failed"):
        ranks.gather(None)
