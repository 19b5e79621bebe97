"""Tests of the intra-op threads that a stage's thread takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ipu_pipeline.ops import extension
from ipu_pipeline.ops.threads import share_threads, take_threads, threads_per_stage

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


def test_the_number_can_change() -> None:
    stage = Worker()
    for count in (1, 3, 2):
        stage(lambda n=count: take_threads(n))  # type: ignore[misc]
        assert stage(ours) == count
    assert Worker()(torch.get_num_threads) == 3


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


def all_shares(works: int, available: int) -> Iterator[tuple[int, ...]]:
    for shares in itertools.product(range(1, available + 1), repeat=works):
        if sum(shares) <= max(available, works):
            yield shares


@given(
    loads=st.lists(st.floats(min_value=0.0, max_value=10.0), min_size=1, max_size=4),
    available=st.integers(min_value=1, max_value=7),
)
def test_no_other_way_to_share_has_a_smaller_largest_load(
    loads: list[float], available: int
) -> None:
    def largest(shares: tuple[int, ...]) -> float:
        return max(load / share for load, share in zip(loads, shares, strict=True))

    shares = share_threads(loads, available)
    assert sum(shares) == max(available, len(loads))
    assert largest(shares) == min(map(largest, all_shares(len(loads), available)))


@pytest.mark.parametrize(
    ("loads", "available", "shares"),
    [([2, 2], 8, (4, 4)), ([3, 1], 8, (6, 2)), ([1, 1, 1], 8, (3, 3, 2)), ([0, 0], 4, (2, 2))],
)
def test_shares(loads: list[float], available: int, shares: tuple[int, ...]) -> None:
    assert share_threads(loads, available) == shares
