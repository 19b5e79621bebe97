"""What a serialized lookup costs: ``python -m benchmarks.kernel_embedding [--threads N]``.

A table of 250,112 x 768 (mT5-base) and 2,048 ids, against ``functional.embedding``. The gradient
is added into one that is there already, as in every microbatch but the first. Peak memory is
that of the backward pass over what was resident before it, from /proc (Linux).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.memory_probe import reset_peak, resident_bytes
from ipu_pipeline.ops import embedding, extension
from ipu_pipeline.ops.embedding import embedding_serialized

ROWS, HIDDEN, IDS = 250_112, 768, 2048


def measure(lookup: Callable[[], Tensor]) -> tuple[float, float, float]:
    """Return seconds forward, seconds backward, and MiB that the backward pass needs."""
    start = perf_counter()
    out_NH = lookup()
    forward_s = perf_counter() - start
    upstream_NH = torch.ones_like(out_NH)
    reset_peak()
    resident = resident_bytes("VmRSS")
    start = perf_counter()
    out_NH.backward(upstream_NH)
    backward_s = perf_counter() - start
    return forward_s, backward_s, (resident_bytes("VmHWM") - resident) / 2**20


def times(rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    """Return what :func:`measure` returns of every way, by round; torch's is the first."""
    torch.manual_seed(0)
    weight_VH = torch.randn(ROWS, HIDDEN, requires_grad=True)
    weight_VH.grad = torch.zeros(ROWS, HIDDEN)
    ids = torch.randint(ROWS, (4, IDS // 4))

    def serialized() -> Tensor:
        return embedding_serialized(ids, weight_VH, factor=4)

    def plain() -> Tensor:
        return functional.embedding(ids, weight_VH)

    ways = {"functional.embedding": plain, "serialized, plain torch": serialized,
            "serialized, kernel": serialized}  # fmt: skip
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            with mock.patch.object(embedding, "_kernels", return_value="plain" not in name):
                found[name].append(measure(way))
    return found


def main() -> None:
    """Interleave the three ways; print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not embedding._kernels():
        raise SystemExit(extension.state().detail)
    found = times(arguments.rounds)
    print(f"{arguments.threads} threads, {extension.state().detail}")
    for name, rows in found.items():
        forward_s, backward_s, peak = (median(column) for column in zip(*rows, strict=True))
        print(f"  {name:24} {1e3 * forward_s:7.2f} ms + {1e3 * backward_s:8.2f} ms, "
              f"backward pass needs {peak:7.1f} MiB")  # fmt: skip


if __name__ == "__main__":
    main()
