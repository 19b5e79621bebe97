"""The parts that watch: limits of an action, who is gone, how processes meet, what is compared."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from ipu_pipeline.backends.cluster.ranks import heartbeat
from ipu_pipeline.backends.cluster.ranks.consistency import _checksum
from ipu_pipeline.backends.cluster.ranks.heartbeat import Activity, Failure, Heartbeats
from ipu_pipeline.backends.cluster.ranks.rendezvous import meet
from ipu_pipeline.errors import LoweringError


def test_an_action_may_last_many_times_the_longest_like_it() -> None:
    activity = Activity()
    assert activity.limit_s(600.0) == float("inf")  # the caller's own code
    activity.enter("a training step", 3)
    assert activity.limit_s(600.0) == 600.0
    with activity.during("forward pass"):
        assert activity.limit_s(600.0) == 600.0  # never seen before
    with activity.during("forward pass"):
        assert activity.limit_s(600.0) == heartbeat.HANG_S
        assert activity.limit_s(10.0) == 10.0
        activity.longest["forward pass"] = 10.0
        assert activity.limit_s(600.0) == 10.0 * heartbeat.HANG_FACTOR
        with activity.waits():
            assert activity.limit_s(600.0) == 600.0
        activity.longest.clear()
        assert activity.limit_s(600.0) == 600.0
    activity.enter("a training step", 4)
    activity.leave()
    assert str(activity) == "the caller's own code, step 4"


def test_time_spent_waiting_is_no_part_of_an_action() -> None:
    activity, begin = Activity(), time.monotonic()
    with activity.during("the optimizer step"), activity.waits():
        time.sleep(0.5)
    assert activity.longest["the optimizer step"] <= time.monotonic() - begin - 0.5
    with ThreadPoolExecutor(1) as pool:  # a thread in the background says nothing
        pool.submit(lambda: activity.waits().__enter__()).result()
    assert not activity.waiting


def test_the_first_failure_counts() -> None:
    store = HashStore()
    boards = [Heartbeats(store, rank, [1 - rank], Activity()) for rank in (0, 1)]
    first = boards[0].tell(Failure("rank 0 failed"))
    assert boards[1].tell(Failure("rank 1 failed")) == first == Failure("rank 0 failed")
    for board in boards:
        board.close()
    boards[1]._exchange()
    assert boards[1].seen[0].closed


def _meet_all(store: HashStore, world_size: int) -> set[str]:
    with ThreadPoolExecutor(world_size) as pool:
        found = [pool.submit(meet, store, rank, world_size, 30.0) for rank in range(world_size)]
        return {each.result() for each in found}


def test_processes_that_are_started_again_meet_under_another_name() -> None:
    store = HashStore()
    first, second, third = (_meet_all(store, size) for size in (3, 3, 2))
    assert len(first) == len(second) == len(third) == 1
    assert len(first | second | third) == 3


def test_nobody_takes_those_who_are_gone_for_those_who_come() -> None:
    store = HashStore()
    old = _meet_all(store, 2)
    found: list[str] = []
    late = threading.Thread(target=lambda: found.append(meet(store, 1, 2, 30.0)))
    late.start()
    time.sleep(0.2)  # the old answer is there, and must not be taken
    assert not found
    assert meet(store, 0, 2, 30.0) not in old
    late.join()
    assert set(found).isdisjoint(old)


@pytest.mark.parametrize(("rank", "absent"), [(0, "rank 1, 2"), (1, "rank 0")])
def test_who_does_not_come_is_named(rank: int, absent: str) -> None:
    message = rf"rank {rank} has waited \d+ s for {absent} to compile the model"
    with pytest.raises(LoweringError, match=message):
        meet(HashStore(), rank, 3, 0.1)


def test_weights_are_compared_by_a_sample_with_both_ends() -> None:
    with torch.no_grad():
        model = nn.Linear(300, 300)
        found = {_checksum(model)}
        for where in (0, -1):
            model.weight.view(-1)[where] += 1
            found.add(_checksum(model))
        model.bias.data = model.bias.data[:-1]
        found.add(_checksum(model))
        model.weight.data = model.weight.data.t()
        found.add(_checksum(model))
        found.add(_checksum(model.to("meta")))
    assert len(found) == 6
