"""Run the same work on several threads at once, as the stages of a pipeline do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

from ipu_pipeline.ops.threads import take_threads, threads_per_stage

T = TypeVar("T")


def on_threads(work: Callable[[], T], count: int) -> list[T]:
    """Return what ``work`` returned on each of ``count`` threads that started together.

    Every thread gets the intra-op threads that a stage of a ``count``-stage pipeline gets.
    """
    per_thread = threads_per_stage(count)
    barrier = Barrier(count)

    def start() -> T:
        take_threads(per_thread)
        barrier.wait()
        return work()

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(start) for _ in range(count)]]
