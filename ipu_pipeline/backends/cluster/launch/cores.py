"""What this machine has for processes: its physical cores, as far as this process may use them."""

from __future__ import annotations

import os
from pathlib import Path

CPU_FOLDER = Path("/sys/devices/system/cpu")
QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(cpu_folder: Path = CPU_FOLDER, quota_file: Path = QUOTA_FILE) -> int:
    """Return how many physical cores this process may use, at least 1.

    Two threads of one core count once: matrix products fill a core with one. A container's limit
    on processor time counts as well.

    Args:
        cpu_folder: Where Linux describes its processors.
        quota_file: Where it says how many microseconds of how many a container may run.
    """
    usable = _usable_processors()
    cores = {_siblings(cpu_folder, processor) for processor in usable}
    return max(1, min(len(cores), _quota(quota_file) or len(cores)))


def threads_per_process(num_processes: int, num_cores: int) -> int:
    """Return an even share of the cores, at least 1."""
    return max(1, num_cores // num_processes)


def _usable_processors() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _siblings(cpu_folder: Path, processor: int) -> str:
    """Return what the hardware threads of one core have in common."""
    path = cpu_folder / f"cpu{processor}" / "topology" / "thread_siblings_list"
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return str(processor)  # not Linux, or not told: every processor is a core


def _quota(path: Path) -> int | None:
    """Return the cores that a container's limit amounts to, rounded down; ``None`` for no limit."""
    try:
        limit, period = path.read_text(encoding="ascii").split()
        return max(1, int(limit) // int(period))
    except (OSError, ValueError):
        return None
