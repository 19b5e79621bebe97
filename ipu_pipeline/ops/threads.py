"""How the cores of this machine are shared by the stages that run at the same time."""

from __future__ import annotations

import heapq
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ipu_pipeline.ops import extension

_one_at_a_time = threading.Lock()


def available_threads() -> int:
    """Return how many intra-op threads the calling thread's work may have in all."""
    return min(torch.get_num_threads(), len(os.sched_getaffinity(0)))


def threads_per_stage(num_stages: int) -> int:
    """Return how many intra-op threads each of ``num_stages`` equal stages has, at least 1."""
    return max(1, available_threads() // num_stages)


def share_threads(loads: Sequence[float], available: int) -> tuple[int, ...]:
    """Return how many of ``available`` threads each of some works has that run at the same time.

    One each, whatever is available; every further one goes to the work with the most load per
    thread, which makes the largest load per thread as small as it can be.

    Args:
        loads: Seconds on one thread, or any other measure; at least 0.
        available: Threads in all.
    """
    shares = [1] * len(loads)
    # Works without any load take turns.
    waiting = [(-load, 1, index) for index, load in enumerate(loads)]
    heapq.heapify(waiting)
    for _ in range(available - len(loads)):
        _, share, index = heapq.heappop(waiting)
        shares[index] = share + 1
        heapq.heappush(waiting, (-loads[index] / shares[index], shares[index], index))
    return tuple(shares)


def take_threads(count: int) -> None:
    """Give the operators of the calling thread ``count`` intra-op threads, and no other thread's.

    ``torch.set_num_threads`` alone also changes the number of the process, which every thread
    takes over at its first parallel loop, even a thread that has worked for long: once in every
    shared library that has such loops.
    """
    with _one_at_a_time, ThreadPoolExecutor(1) as new_thread:
        of_process = new_thread.submit(torch.get_num_threads).result()
        # Taken over by this thread now, and not after its own number is set.
        torch.get_num_threads()
        if extension.state().usable:
            torch.ops.ipu_pipeline.threads_here()
        torch.set_num_threads(count)
        new_thread.submit(torch.set_num_threads, of_process).result()
