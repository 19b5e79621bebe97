"""Describe this machine: measured matrix FLOP/s and memory bandwidth of one pipeline device.

All devices are measured at the same time, each with its share of the cores, because the stages
of a pipeline run at the same time, too; ``calibration.py`` has what is measured besides the peaks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.nn import functional

from ipu_pipeline.backends.local.measure.cache import (
    load_measurements,
    one_process,
    store_measurements,
)
from ipu_pipeline.backends.local.measure.calibration import (
    bytes_curve,
    flat,
    op_rates,
    overhead_s,
    points,
    product_curve,
    seconds_of,
)
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ops.scope import block_scope
from ipu_pipeline.ops.threads import threads_per_stage

MATRIX_SIZE = 768
COPY_ELEMENTS = 16 * 1024 * 1024
DTYPES = ("float32", "bfloat16")
DETAILS = ("copy", "overhead", "products", "bytes", "rate-gelu")
RATE = "rate-"
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
    measured = _measured(num_devices)
    (bandwidth,), (overhead,) = measured["copy"], measured["overhead"]
    memory = int(_available_memory() * USABLE_MEMORY / num_devices)
    devices = tuple(
        Device(
            f"cpu{index}",
            memory,
            {dtype: measured[dtype][0] for dtype in DTYPES},
            bandwidth,
            op_overhead_s=overhead,
            product_curve=points(measured["products"]),
            bytes_curve=points(measured["bytes"]),
            op_rates=_rates(measured),
        )
        for index in range(num_devices)
    )
    return Machine("local", devices, Link(bytes_per_s=bandwidth), shared_memory=True)


def _measured(num_devices: int) -> dict[str, list[float]]:
    """Return everything measured about one device; what is not on disk is measured now."""
    name = f"machine-{num_devices}x{threads_per_stage(num_devices)}"
    known = load_measurements(name)
    if _is_whole(known):
        return known
    with one_process(name):
        known = load_measurements(name)
        return known if _is_whole(known) else _measure(name, num_devices)


def _is_whole(known: Mapping[str, list[float]]) -> bool:
    return {*DTYPES, *DETAILS} <= set(known)


def _measure(name: str, num_devices: int) -> dict[str, list[float]]:
    known = {dtype: [_matrix_flops_per_s(dtype, num_devices)] for dtype in DTYPES}
    known["copy"] = [_copy_bytes_per_s(num_devices)]
    known["overhead"] = [overhead_s(num_devices)]
    known["products"] = flat(product_curve(num_devices))
    known["bytes"] = flat(bytes_curve(num_devices))
    known |= {f"{RATE}{op}": [rate] for op, rate in op_rates(num_devices).items()}
    store_measurements(name, known)
    return known


def _rates(measured: Mapping[str, list[float]]) -> dict[str, float]:
    return {
        name.removeprefix(RATE): values[0]
        for name, values in measured.items()
        if name.startswith(RATE)
    }


def _matrix_flops_per_s(dtype: str, num_devices: int) -> float:
    def make() -> Callable[[], object]:
        shape = (MATRIX_SIZE, MATRIX_SIZE)
        left, right = (torch.randn(shape).to(getattr(torch, dtype)) for _ in range(2))

        def call() -> None:
            with torch.no_grad(), block_scope("calibration"):
                functional.linear(left, right)

        return call

    return 2 * MATRIX_SIZE**3 / seconds_of(make, num_devices)


def _copy_bytes_per_s(num_devices: int) -> float:
    def make() -> Callable[[], object]:
        source, target = torch.ones(COPY_ELEMENTS), torch.ones(COPY_ELEMENTS)
        return lambda: target.copy_(source)

    return 2 * 4 * COPY_ELEMENTS / seconds_of(make, num_devices)


def _available_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
