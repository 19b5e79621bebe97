"""How the cores of this machine are shared by the stages that run at the same time."""

from __future__ import annotations

import os

import torch


def threads_per_stage(num_stages: int) -> int:
    """Return how many intra-op threads each of ``num_stages`` stages may use, at least 1."""
    available = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    return max(1, available // num_stages)
