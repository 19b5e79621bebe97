"""The parts that watch: limits of an action, who is gone, how processes meet, what is compared."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from ipu_pipeline.backends.cluster import doing as doing_module
from ipu_pipeline.backends.cluster.agreement import _checksum
from ipu_pipeline.backends.cluster.bulletin import Beat, Bulletin, Verdict, is_gone, own_process
from ipu_pipeline.backends.cluster.doing import Doing
from ipu_pipeline.backends.cluster.joining import meet
from ipu_pipeline.errors import LoweringError


def test_an_action_may_last_many_times_the_longest_like_it() -> None:
    doing = Doing()
    assert doing.limit_s(600.0) == float("inf")  # the caller's own code
    doing.enter("a training step", 3)
    assert doing.limit_s(600.0) == 600.0
    with doing.during("forward pass"):
        assert doing.limit_s(600.0) == 600.0  # never seen before
    with doing.during("forward pass"):
        assert doing.limit_s(600.0) == doing_module.HANG_S
        assert doing.limit_s(10.0) == 10.0
        doing.longest["forward pass"] = 10.0
        assert doing.limit_s(600.0) == 10.0 * doing_module.HANG_FACTOR
        with doing.waits():
            assert doing.limit_s(600.0) == 600.0
        doing.prepares = True
        assert doing.limit_s(600.0) == 600.0
    doing.enter("a training step", 4)
    assert not doing.prepares
    doing.leave()
    assert str(doing) == "the caller's own code, step 4"


def test_time_spent_waiting_is_no_part_of_an_action() -> None:
    doing = Doing()
    with doing.during("the optimizer step"), doing.waits():
        time.sleep(0.05)
    assert doing.longest["the optimizer step"] < 0.05
    with ThreadPoolExecutor(1) as pool:  # a thread in the background says nothing
        pool.submit(lambda: doing.waits().__enter__()).result()
    assert not doing.waiting


def test_a_process_is_gone_when_it_has_ended() -> None:
    place, own = own_process()
    ended = subprocess.Popen([sys.executable, "-c", "print(1)"], stdout=subprocess.PIPE)
    assert ended.stdout is not None
    ended.stdout.read()  # at its end it is a zombie
    deadline = time.monotonic() + 30
    while not is_gone((place, ended.pid)):
        assert time.monotonic() < deadline
    ended.communicate()
    assert is_gone((place, ended.pid))
    assert not is_gone((place, own))
    assert not is_gone(("another machine", ended.pid))
    assert not is_gone(("", 0))


def test_the_first_failure_counts() -> None:
    store = HashStore()
    boards = [Bulletin(store, rank, [1 - rank], lambda n: Beat(n, "working")) for rank in (0, 1)]
    first = boards[0].tell(Verdict("rank 0 failed"))
    assert boards[1].tell(Verdict("rank 1 failed")) == first == Verdict("rank 0 failed")
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
    message = f"rank {rank} has waited 0 s for {absent} to compile the model"
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
