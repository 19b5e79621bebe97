"""Tests of the intra-op threads that a stage's thread takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from ipu_pipeline.ops import extension
from ipu_pipeline.ops.threads import take_threads, threads_per_stage

T = TypeVar("T")


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Worker:
    """One thread that runs what it is given."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def __call__(self, job: Callable[[], T]) -> T:
        return self._pool.submit(job).result()


def ours() -> int:
    """Run a parallel loop of our library; return the number of threads afterwards."""
    if extension.available():
        torch.ops.ipu_pipeline.threads_here()
    return torch.get_num_threads()


def test_the_thread_has_its_number_and_keeps_it() -> None:
    stage = Worker()
    stage(lambda: take_threads(1))
    assert stage(torch.get_num_threads) == 1
    assert stage(ours) == 1
    assert stage(lambda: threads_per_stage(1)) == 1


def test_no_other_thread_is_changed() -> None:
    # It has used torch, and our library not yet.
    early, stage = Worker(), Worker()
    assert early(torch.get_num_threads) == 3
    stage(lambda: take_threads(1))
    assert early(ours) == 3
    assert Worker()(torch.get_num_threads) == 3
    assert torch.get_num_threads() == 3


def test_a_later_change_of_the_process_leaves_a_stage_alone() -> None:
    stage = Worker()
    stage(lambda: take_threads(1))
    torch.set_num_threads(2)
    assert stage(ours) == 1
    stage(lambda: torch.ones(100_000).exp_())
    assert stage(torch.get_num_threads) == 1


def test_several_at_once() -> None:
    stages = [Worker() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda stage: stage(lambda: take_threads(2)), stages))
    assert [stage(ours) for stage in stages] == [2] * 4
    assert Worker()(ours) == 3
