"""How the cores of this machine are shared by the stages that run at the same time."""

from __future__ import annotations

import os
import threading

import torch

from ipu_pipeline.ops import extension

_one_at_a_time = threading.Lock()


def threads_per_stage(num_stages: int) -> int:
    """Return how many intra-op threads each of ``num_stages`` stages may use, at least 1."""
    available = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    return max(1, available // num_stages)


def take_threads(count: int) -> None:
    """Give the operators of the calling thread ``count`` intra-op threads, and no other thread's.

    For a new thread, before its first operator. ``torch.set_num_threads`` alone also changes the
    number of the process, which every thread takes over at its first parallel loop, even a
    thread that has worked for long: once in every shared library that has such loops.
    """
    with _one_at_a_time:
        of_process = torch.get_num_threads()  # taken over by this thread now, and not later
        if extension.state().usable:
            torch.ops.ipu_pipeline.threads_here()
        torch.set_num_threads(count)
        # The process's number is set by whoever spoke last; this thread keeps its own.
        restore = threading.Thread(target=torch.set_num_threads, args=(of_process,))
        restore.start()
        restore.join()
