"""Describe this machine: measured rates of one pipeline device, as stages run on it.

All devices are measured at the same time, each with its share of the cores, because the stages of a
pipeline run at the same time, too. Products and attention run through the same functions as a
block's, forward and backward, with gradients to add to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import quantiles
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ipu_pipeline.backends.local.measure.cache import (
    load_measurements,
    one_process,
    store_measurements,
)
from ipu_pipeline.ir.attention import attention_name
from ipu_pipeline.ir.limits import check_count
from ipu_pipeline.ir.machine import Curve, Device, Link, Machine
from ipu_pipeline.ops.linear import adding_to_grad
from ipu_pipeline.ops.random import block_scope
from ipu_pipeline.ops.threads import take_threads, threads_per_stage

T = TypeVar("T")
Call = Callable[[], object]
REPEATS = 7
STACK_REPEATS = 3  # of many products each
# Enough weights in turn that each is read from memory again, as in a stage of several layers.
STACK_BYTES = 24 * 1024 * 1024
MOST_WEIGHTS = 12
# glibc gives freed memory back to the system until the process has freed a block of this size
# once, which every model of some size does in its first step.
ALLOCATOR_BYTES = 32 * 1024 * 1024 - 4096
PRODUCT_SIZES = (64, 128, 256, 512, 768)
# Outputs from 64 KiB to 64 MiB; the largest are above what the allocator keeps for itself.
COPY_SIZES = (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 23, 1 << 24)
ROWS, WIDTH = 512, 512  # of a tensor that stays in a cache
ATTENTION = (4, 8, 192, 64)  # B, H, L, E
TINY_STEPS = 16

aten = torch.ops.aten
MATRIX_SIZE = 768
COPY_ELEMENTS = 16 * 1024 * 1024
DTYPES = ("float32", "bfloat16")
USABLE_MEMORY = 0.8  # of what is free: the rest is for the interpreter, data and the page cache


def local_machine(num_devices: int) -> Machine:
    """Measure this machine as ``num_devices`` devices that share memory.

    Args:
        num_devices: Stages that run at the same time, at least 1.

    Raises:
        ValueError: ``num_devices`` is below 1, or more than one machine runs.
    """
    check_count("num_stages on this machine", num_devices, "workers")
    device = _measured(num_devices)
    memory = int(_available_memory() * USABLE_MEMORY / num_devices)
    devices = tuple(
        replace(device, name=f"cpu{index}", memory_bytes=memory) for index in range(num_devices)
    )
    return Machine("local", devices, Link(device.memory_bytes_per_s), shared_memory=True)


def _measured(num_devices: int) -> Device:
    """Return one device, its memory apart; what is not on disk is measured now."""
    name = f"device-{num_devices}x{threads_per_stage(num_devices)}"
    if known := load_measurements(name, Device):
        return known
    with one_process(name):
        if known := load_measurements(name, Device):
            return known
        device = Device(
            "cpu",
            memory_bytes=1,
            flops_per_s={dtype: _matrix_flops_per_s(dtype, num_devices) for dtype in DTYPES},
            memory_bytes_per_s=_copy_bytes_per_s(num_devices),
            op_overhead_s=overhead_s(num_devices),
            product_curve=product_curve(num_devices),
            bytes_curve=bytes_curve(num_devices),
            op_rates=op_rates(num_devices),
        )
        store_measurements(name, device)
        return device


def _matrix_flops_per_s(dtype: str, num_devices: int) -> float:
    def make() -> Call:
        shape = (MATRIX_SIZE, MATRIX_SIZE)
        left, right = (torch.randn(shape).to(getattr(torch, dtype)) for _ in range(2))

        def call() -> None:
            with torch.no_grad(), block_scope("calibration"):
                functional.linear(left, right)

        return call

    return 2 * MATRIX_SIZE**3 / seconds_of(make, num_devices)


def _copy_bytes_per_s(num_devices: int) -> float:
    def make() -> Call:
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


def seconds_of(make: Callable[[], Call], num_devices: int, repeats: int = REPEATS) -> float:
    """Return the lower quartile of the seconds of one call while all devices do the same.

    Each device's thread makes the call, and times it after one that warms up.
    """

    def measure() -> list[float]:
        torch.empty(ALLOCATOR_BYTES, dtype=torch.uint8)
        call = make()
        call()
        return [_timed(call) for _ in range(repeats)]

    found = [seconds for result in on_threads(measure, num_devices) for seconds in result]
    return quantiles(found, n=4)[0]


def product_curve(num_devices: int) -> Curve:
    """Return FLOP/s of linear layers, forward and backward, by the FLOPs of one product."""
    curve = []
    for size in PRODUCT_SIZES:
        count = max(2, min(MOST_WEIGHTS, STACK_BYTES // (4 * size * size)))
        seconds = seconds_of(lambda s=size, n=count: _linears(s, n), num_devices, STACK_REPEATS)  # type: ignore[misc]
        flops = 2.0 * size**3
        curve.append((flops, 3 * count * flops / seconds))
    return tuple(curve)


def bytes_curve(num_devices: int) -> Curve:
    """Return bytes per second of an operation that makes a new tensor, by the bytes it moves."""
    curve = []
    for elements in COPY_SIZES:

        def make(n: int = elements) -> Call:
            source = torch.ones(n)
            return lambda: source * 2.0

        moved = 2.0 * 4 * elements
        curve.append((moved, moved / seconds_of(make, num_devices)))
    return tuple(curve)


def overhead_s(num_devices: int) -> float:
    """Return the seconds of an operation that has nothing to do, with its part of the backward."""

    def make() -> Call:
        x = torch.ones(2, requires_grad=True)

        def call() -> None:
            y = x
            for _ in range(TINY_STEPS):
                y = functional.gelu(y)
            y.backward(torch.ones_like(y))

        return call

    return seconds_of(make, num_devices) / (2 * TINY_STEPS)


def op_rates(num_devices: int) -> dict[str, float]:
    """Return elements per second of single operations, FLOP/s of those with FLOPs, by name."""
    elements = ROWS * WIDTH
    rates = {
        name: elements / seconds_of(lambda i=index: _vectors()[i][1], num_devices)  # type: ignore[misc]
        for index, (name, _) in enumerate(_vectors())
    }
    rates["_safe_softmax"] = rates["_softmax"]
    rates["nll_loss_forward"] = rates["_log_softmax"] * WIDTH  # touches one element of a row
    rates |= _attention_rates(num_devices)
    return rates


def _linears(size: int, count: int) -> Call:
    """A chain of linear layers; their gradients are added to those before."""
    weights = [(torch.randn(size, size) / size**0.5).requires_grad_() for _ in range(count)]
    biases = [torch.zeros(size, requires_grad=True) for _ in range(count)]
    x = torch.randn(size, size, requires_grad=True)

    def call() -> None:
        x.grad = None
        y = x
        with block_scope("calibration"):
            for weight, bias in zip(weights, biases, strict=True):
                y = functional.linear(y, weight, bias)
        with adding_to_grad():
            y.backward(y.detach())

    return call


def _vectors() -> Sequence[tuple[str, Call]]:
    """Operations that compute more than they move, on tensors that stay in a cache."""
    x = torch.linspace(-3, 3, ROWS * WIDTH).view(ROWS, WIDTH)
    grad, row = torch.ones_like(x), torch.ones(WIDTH)
    soft, positive = torch.softmax(x, -1), x.abs() + 0.1
    normed, mean, deviation = aten.native_layer_norm(x, [WIDTH], row, row, 1e-5)
    norm = (mean, deviation, row, row, [True] * 3)
    calls: dict[str, tuple[object, ...]] = {
        **dict.fromkeys(("gelu", "silu", "tanh", "sigmoid", "erf", "exp"), (x,)),
        **dict.fromkeys(("gelu_backward", "silu_backward"), (grad, x)),
        **dict.fromkeys(("log", "rsqrt"), (positive,)),
        **dict.fromkeys(("_softmax", "_log_softmax"), (x, -1, False)),
        "_softmax_backward_data": (grad, soft, -1, x.dtype),
        "_log_softmax_backward_data": (grad, soft, -1, x.dtype),
        "native_layer_norm": (x, [WIDTH], row, row, 1e-5),
        "native_layer_norm_backward": (grad, x, [WIDTH], *norm),
    }

    def dropout() -> None:  # the whole: product and quotient are counted as operations of their own
        with block_scope("calibration"):
            functional.dropout(normed, 0.1)

    timed = [(name, partial(getattr(aten, name), *given)) for name, given in calls.items()]
    return [*timed, ("bernoulli_", dropout)]


def _attention_rates(num_devices: int) -> dict[str, float]:
    """FLOP/s of attention without and with dropout, and of batched products."""
    batch, heads, length, width = ATTENTION
    pair = 4.0 * batch * heads * length * length * width  # two products

    def rate(flops: float, make: Callable[[], Call]) -> float:
        return flops / seconds_of(make, num_devices)

    def products() -> Call:
        query = torch.randn(batch * heads, length, width)
        weights = torch.bmm(query, query.mT)
        return lambda: (torch.bmm(query, query.mT), torch.bmm(weights, query))

    rates = {"bmm": rate(pair, products)}
    for p in (0.0, 0.1):  # the backward pass computes the scores again: five products
        forward, backward = (
            attention_name(bias=False, dropout=p > 0, backward=backward)
            for backward in (False, True)
        )
        rates[forward] = rate(pair, lambda p=p: _attention(p)[0])  # type: ignore[misc]
        rates[backward] = rate(2.5 * pair, lambda p=p: _attention(p)[1])  # type: ignore[misc]
    return rates


def _attention(p: float) -> tuple[Call, Call]:
    """Forward and backward pass of attention with dropout ``p`` and a mask."""
    query, key, value = (torch.randn(ATTENTION, requires_grad=True) for _ in range(3))
    batch, _, length, _ = ATTENTION
    mask = torch.zeros(batch, 1, length, length)

    def forward() -> Tensor:
        with block_scope("calibration"):
            attend = functional.scaled_dot_product_attention
            return attend(query, key, value, attn_mask=mask, dropout_p=p)

    out = forward()
    seed = torch.ones_like(out)
    return forward, lambda: torch.autograd.grad(out, (query, key, value), seed, retain_graph=True)


def _timed(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
