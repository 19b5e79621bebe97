"""Machines: devices with memory and speed, and the links between them. Plain data."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import log
from pathlib import Path
from typing import Any

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.codec import from_json, read_json, to_json
from ipu_pipeline.ir.limits import LIMITS, check_count, count_of

# Of every rate per second, and of every fixed time: far beyond, a price would be infinite.
_RATES, _LONGEST_S = (1e-9, 1e30), 1e9


def _check_speeds(what: str, rates: Mapping[str, float], times: Mapping[str, float]) -> None:
    wrong = [f"{n} {v}" for n, v in rates.items() if not _RATES[0] <= v <= _RATES[1]]
    wrong += [f"{n} {v}" for n, v in times.items() if not 0 <= v <= _LONGEST_S]
    if wrong:
        raise ValueError(
            f"{what} needs rates from {_RATES[0]} to {_RATES[1]} per second and times from 0 to "
            f"{_LONGEST_S} seconds, got {wrong[0]}"
        )


@dataclass(frozen=True)
class Link:
    """A connection between two devices.

    Attributes:
        bytes_per_s: Bandwidth in bytes per second, one direction.
        latency_s: Fixed time of one message, in seconds.
    """

    bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        _check_speeds("a link", {"bytes_per_s": self.bytes_per_s}, {"latency_s": self.latency_s})

    def transfer_s(self, num_bytes: int) -> float:
        """Seconds to move ``num_bytes`` in one message; 0 for nothing."""
        return self.latency_s + num_bytes / self.bytes_per_s if num_bytes else 0.0


Curve = tuple[tuple[float, float], ...]


def on_curve(curve: Curve, size: float) -> float:
    """Return a measured rate at ``size``: between two points along the logarithm of the size.

    Args:
        curve: Points ``(size, rate)`` by rising size, at least one.
        size: Below the first point its rate holds, beyond the last one that one's.
    """
    position = bisect_left([point[0] for point in curve], size)
    if position == 0 or position == len(curve):
        return curve[min(position, len(curve) - 1)][1]
    (low, slow), (high, fast) = curve[position - 1], curve[position]
    share = log(size / low) / log(high / low)
    return slow + share * (fast - slow)


@dataclass(frozen=True)
class KernelRates:
    """Shares of its peaks that a generation of GPUs reaches, the same for every model.

    Attributes:
        name: Of the generation, such as ``hopper``.
        product_share: Of the peak of a dtype, by a large matrix product; ``bfloat16`` is required
            and stands for the dtypes that are not listed.
        half_size: A product whose side has so many elements takes twice as long as its FLOPs say:
            every side ``d`` costs a factor ``d / (d + half_size)`` (edges of tiles and the
            beginning and end of its loop over them).
        attention_share: Of the bfloat16 peak, by fused attention, forward and backward.
        bandwidth_share: Of the memory bandwidth, by operations that are bound by it.
        link_share: Of a link's bandwidth, by collectives and copies.
    """

    name: str
    product_share: Mapping[str, float] = field(hash=False)
    half_size: float
    attention_share: tuple[float, float]
    bandwidth_share: float
    link_share: float

    def __post_init__(self) -> None:
        shares = [
            *self.product_share.values(),
            *self.attention_share,
            self.bandwidth_share,
            self.link_share,
        ]
        if "bfloat16" not in self.product_share:
            raise ValueError("kernels give no product_share for bfloat16")
        if self.half_size < 0 or any(not 0 < share <= 1 for share in shares):
            raise ValueError(
                "kernels need shares above 0 and at most 1, and a half_size of at least 0, got "
                f"{shares} and {self.half_size}"
            )

    def product_efficiency(self, dtype: str, sides: tuple[float, ...]) -> float:
        """Return the share of the dtype's peak that a product with ``sides`` reaches."""
        share = self.product_share.get(dtype, self.product_share["bfloat16"])
        for side in sides:
            share *= side / (side + self.half_size)
        return share


@dataclass(frozen=True)
class Device:
    """One device that holds stages: an IPU, a GPU, or some cores of this machine.

    Attributes:
        name: Shown in tables, such as ``ipu0``.
        memory_bytes: Memory it can use for stages.
        flops_per_s: Peak matrix FLOP/s by dtype; ``float32`` is required.
        memory_bytes_per_s: Memory bandwidth in bytes per second.
        reserved_bytes: Fixed overhead (code, control) that stages cannot use.
        kind: Family that a specific cost model knows (``ipu-gc200``, ``ipu-bow``), else
            ``generic``.
        op_overhead_s: Seconds that every operation takes besides its work.
        host_sync_s: Seconds for which it has nothing to do when its host must read a result first
            (how many tokens every expert got).
        product_curve: Measured float32 FLOP/s of one matrix product by its FLOPs, rising; small
            products do not reach the peak. Empty: all reach it.
        bytes_curve: Measured bytes per second of an operation that makes a new tensor, by the
            bytes it reads and writes, rising: small tensors are still in a cache, the pages of
            large ones come new from the system. Empty: ``memory_bytes_per_s`` for all.
        op_rates: Measured work per second of operations by name (``gelu``): FLOP/s where FLOPs
            are counted, else elements.
        kernels: Shares of the peaks that its kernels reach; ``None``: all reach them.
    """

    name: str
    memory_bytes: int
    flops_per_s: Mapping[str, float] = field(hash=False)
    memory_bytes_per_s: float
    reserved_bytes: int = 0
    kind: str = "generic"
    op_overhead_s: float = 0.0
    product_curve: Curve = field(default=(), hash=False)
    bytes_curve: Curve = field(default=(), hash=False)
    op_rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    kernels: KernelRates | None = None
    host_sync_s: float = 0.0

    def __post_init__(self) -> None:
        if "float32" not in self.flops_per_s:
            raise ValueError(f"device {self.name!r} gives no flops_per_s for float32")
        if self.memory_bytes <= 0 or self.reserved_bytes < 0:
            raise ValueError(
                f"device {self.name!r} needs memory_bytes above 0 and reserved_bytes of at least "
                f"0, got {self.memory_bytes} and {self.reserved_bytes}"
            )
        rates = {
            "memory_bytes_per_s": self.memory_bytes_per_s,
            **{f"flops_per_s of {name}": rate for name, rate in self.flops_per_s.items()},
            **{f"op_rates of {name}": rate for name, rate in self.op_rates.items()},
            **{f"rate of product_curve at {size}": rate for size, rate in self.product_curve},
            **{f"rate of bytes_curve at {size}": rate for size, rate in self.bytes_curve},
        }
        times = {"op_overhead_s": self.op_overhead_s, "host_sync_s": self.host_sync_s}
        _check_speeds(f"device {self.name!r}", rates, times)
        for curve in (self.product_curve, self.bytes_curve):
            sizes = [size for size, _ in curve]
            if sizes != sorted(set(sizes)) or any(size <= 0 for size in sizes):
                raise ValueError(
                    f"device {self.name!r} has a curve whose sizes are not above 0 and rising: "
                    f"{sizes}"
                )

    @property
    def scales_blocks(self) -> bool:
        """Whether its products take a scale for every few elements, as all that have float4 do."""
        return "float4" in self.flops_per_s

    def peak_flops_per_s(self, dtype: str) -> float:
        """Peak FLOP/s for ``dtype``; the float32 peak where the dtype is not listed."""
        return self.flops_per_s.get(dtype, self.flops_per_s["float32"])


@dataclass(frozen=True)
class Machine:
    """Devices in pipeline order and the links between them.

    Attributes:
        name: Such as ``local`` or ``pod16``.
        devices: All devices, in the order in which a pipeline visits them.
        link: Link between devices on one board (or everywhere).
        board_link: Link between boards; ``None`` means ``link``.
        devices_per_board: Devices on one board; 0 means that all are on one.
        shared_memory: Devices are threads of one process: a transfer hands over a pointer and
            ``memory_bytes`` of the devices add up to the machine's memory.
        backend: Name of the backend that prices and runs it; empty: the first that says it can.
    """

    name: str
    devices: tuple[Device, ...]
    link: Link
    board_link: Link | None = None
    devices_per_board: int = 0
    shared_memory: bool = False
    backend: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.devices) <= LIMITS["num_devices"]:
            raise ValueError(
                f"machine {self.name!r} has {count_of(len(self.devices), 'device')}; 1 to "
                f"{LIMITS['num_devices']} are possible"
            )
        if self.devices_per_board < 0:
            raise ValueError(
                f"machine {self.name!r} has {self.devices_per_board} devices_per_board; give how "
                "many are on one board, 0 for all"
            )

    def link_between(self, first: int, second: int) -> Link:
        """Return the link between two devices, given by their positions."""
        if self.board_link is None or self.devices_per_board == 0:
            return self.link
        same_board = first // self.devices_per_board == second // self.devices_per_board
        return self.link if same_board else self.board_link

    def fingerprint(self) -> str:
        """Hex digest of every number in the description."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        text = json.dumps(to_json(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; :meth:`from_json` reads it back."""
        found: dict[str, Any] = to_json(self)
        return found

    @classmethod
    def from_json(cls, raw: Any, source: str = "machine description") -> Machine:
        """Build a machine from plain JSON data.

        Instead of ``devices`` there may be one ``device`` and a ``count``: so many of it, called
        by its name and a number. Its ``kernels`` may be the name of a generation (``hopper``).

        Raises:
            PlanError: A field is missing, unknown or out of range.
        """
        if isinstance(raw, Mapping) and "device" in raw:
            raw = {**raw, "devices": _replicated(raw, source)}
            del raw["device"], raw["count"]
        return from_json(cls, raw, source, PlanError)

    @classmethod
    def load(cls, path: str | Path) -> Machine:
        """Read a machine file (JSON).

        Raises:
            PlanError: The file is missing or is no machine description.
        """
        return cls.from_json(
            read_json(path, "the machine file", PlanError, shown_texts=True), str(path)
        )


def _replicated(raw: Mapping[str, Any], source: str) -> list[Device]:
    """Return ``count`` devices of one description.

    Raises:
        PlanError: The count is missing or out of range, or there are ``devices`` besides.
    """
    name = f"{source}: the count of one device"
    check_count(name, raw.get("count"), "num_devices", error=PlanError)
    if "devices" in raw:
        raise PlanError(f"{source}: it has device and devices; give one of them")
    device = raw["device"]
    if isinstance(device, Mapping) and isinstance(kernels := device.get("kernels"), str):
        from ipu_pipeline.ir.machines import kernel_rates

        try:
            device = {**device, "kernels": to_json(kernel_rates(kernels))}
        except PlanError as error:
            raise PlanError(f"{source}, device: {error}") from None
    one = from_json(Device, device, f"{source}, device", PlanError)
    return [replace(one, name=f"{one.name}{index}") for index in range(raw["count"])]
