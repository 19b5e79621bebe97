"""Describe this machine: measured matrix FLOP/s and memory bandwidth of one pipeline device.

All devices are measured at the same time, each with its share of the cores, because the stages
of a pipeline run at the same time, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.profiling.cache import load_measurements, store_measurements
from ipu_pipeline.profiling.concurrent import on_threads

MATRIX_SIZE = 768
COPY_ELEMENTS = 16 * 1024 * 1024
REPEATS = 5
DTYPES = ("float32", "bfloat16")
USABLE_MEMORY = 0.8  # of what is free: the rest is for the interpreter, data and the page cache


def local_machine(num_devices: int) -> Machine:
    """Measure this machine as ``num_devices`` devices that share memory.

    Args:
        num_devices: Stages that run at the same time, at least 1.

    Raises:
        ValueError: ``num_devices`` is below 1.
    """
    if num_devices < 1:
        raise ValueError(f"num_devices must be at least 1, got {num_devices}")
    speeds = _speeds(num_devices)
    bandwidth = speeds.pop("copy")
    memory = int(_available_memory() * USABLE_MEMORY / num_devices)
    devices = tuple(
        Device(f"cpu{index}", memory, speeds, bandwidth) for index in range(num_devices)
    )
    return Machine("local", devices, Link(bytes_per_s=bandwidth), shared_memory=True)


def _speeds(num_devices: int) -> dict[str, float]:
    name = f"machine-{num_devices}"
    known = load_measurements(name)
    if set(known) != {*DTYPES, "copy"}:
        known = {dtype: [_matrix_flops_per_s(dtype, num_devices)] for dtype in DTYPES}
        known["copy"] = [_copy_bytes_per_s(num_devices)]
        store_measurements(name, known)
    return {key: values[0] for key, values in known.items()}


def _matrix_flops_per_s(dtype: str, num_devices: int) -> float:
    def make() -> Callable[[], object]:
        shape = (MATRIX_SIZE, MATRIX_SIZE)
        left, right = (torch.randn(shape).to(getattr(torch, dtype)) for _ in range(2))
        return lambda: left @ right

    return 2 * MATRIX_SIZE**3 / _best_seconds(make, num_devices)


def _copy_bytes_per_s(num_devices: int) -> float:
    def make() -> Callable[[], object]:
        source, target = torch.ones(COPY_ELEMENTS), torch.ones(COPY_ELEMENTS)
        return lambda: target.copy_(source)

    return 2 * 4 * COPY_ELEMENTS / _best_seconds(make, num_devices)


def _best_seconds(make: Callable[[], Callable[[], object]], num_devices: int) -> float:
    """Return the best time of one call while all devices do the same."""

    def measure() -> float:
        call = make()
        call()
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return min(times)

    results = on_threads(measure, num_devices)
    return sum(results) / len(results)


def _available_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
