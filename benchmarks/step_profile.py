"""Where a training step's seconds go, and what share of the machine's peak its products reach.

``python -m benchmarks.step_profile bert-small-qa`` runs plain torch and our one stage, which have
all threads for every operation, under torch's profiler. What no operation has is Python, autograd's
engine and waiting. The peak is the best rate of a large product on the same threads, through torch
and through oneDNN.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.suite.contestants import Eager, Trained, make
from benchmarks.suite.material import Material, make_batch, make_material
from benchmarks.suite.workloads import load
from ipu_pipeline.ops import extension

# Of every kind, parts of the names of its operations; the first kind that fits has it.
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention", "attention"),
    "optimizer": ("adam", "_foreach", "optimizer"),
    "head and loss": ("cross_entropy", "nll_loss", "log_softmax"),
    "lookups": ("embedding", "index_put", "index_add"),
    "products": ("addmm", "::mm", "bmm", "linear", "matmul", "mkldnn"),
    "dropout": ("dropout", "bernoulli"),
    "norms": ("norm",),
    "activation": ("gelu", "tanh", "silu", "relu"),
}
REST, OUTSIDE, ALONE = "other operations", "Python and waiting", "all, without the profiler"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
SIDE = 1536


def kind_of(operation: str) -> str:
    """Return the kind of an operation of torch or of ours, by its name."""
    for kind, parts in KINDS.items():
        if any(part in operation.lower() for part in parts):
            return kind
    return REST


def profiled(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Return seconds of a step by kind, and in ``ALONE`` of one without the profiler."""
    step()
    seconds = []
    for _ in range(steps):
        began = perf_counter()
        step()
        seconds.append(perf_counter() - began)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        began = perf_counter()
        for _ in range(steps):
            step()
        whole = (perf_counter() - began) / steps
    by_kind: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        kind = kind_of(event.key)
        if "::" in event.key or kind != REST:
            by_kind[kind] += event.self_cpu_time_total / 1e6 / steps
    return {**by_kind, OUTSIDE: whole - sum(by_kind.values()), ALONE: median(seconds)}


def peak(dtype: torch.dtype, rounds: int = 5) -> float:
    """Return the best FLOP/s of a square product here, through torch and through our operation."""
    a, b = torch.randn(SIDE, SIDE, dtype=dtype), torch.randn(SIDE, SIDE, dtype=dtype)
    ways: list[Callable[[], object]] = [lambda: a @ b]
    if extension.available():
        own = torch.ops.ipu_pipeline
        ways.append(lambda: own.linear_forward(a, b, None, transposed=False))
    best = float("inf")
    for _ in range(rounds):
        for way in ways:
            began = perf_counter()
            way()
            best = min(best, perf_counter() - began)
    return float(2 * SIDE**3 / best)


def product_flops(material: Material, batch: Mapping[str, Any]) -> float:
    """Return the FLOPs of the matrix products of a step, as torch counts those of plain torch."""
    with FlopCounterMode(display=False) as counted:
        Eager(material).step(batch)
    of_all = counted.get_flop_counts()["Global"]
    return float(sum(n for op, n in of_all.items() if str(op).split(".")[-1] in PRODUCTS))


def main(argv: Sequence[str] | None = None) -> int:
    """Profile and print."""
    suite = load()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_profile", description=__doc__)
    parser.add_argument("workload", choices=list(suite.workloads))
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--microbatches", type=int, help="of a step; those of the suite by default")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(suite.cores)
    workload = suite.workloads[options.workload]
    material = make_material(workload, options.precision)
    batch = make_batch(workload, options.microbatches or workload.check_microbatches)
    flops, best = product_flops(material, batch), peak(material.dtype or torch.float32)
    rows = {}
    for name in workload.contestants:
        contestant = suite.contestants[name]
        if contestant.kind not in ("eager", "local") or contestant.stages > 1:
            continue
        trained: Trained = make(contestant, workload, options.precision, material)
        rows[name] = profiled(lambda own=trained: own.step(batch), options.steps)  # type: ignore[misc]
    result = {"peak": best, "flops": flops, "seconds": rows,
              "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
    print(json.dumps(result) if options.json else table(result))
    return 0


def table(result: Mapping[str, Any]) -> str:
    """Return a Markdown table: milliseconds by kind and contestant, and shares of the peak."""
    rows = result["seconds"]
    kinds = [*KINDS, REST, OUTSIDE, ALONE]
    lines = [f"| ms of a step | {' | '.join(rows)} |", "|---|" + "---:|" * len(rows)]
    for kind in kinds:
        cells = " | ".join(f"{1e3 * row.get(kind, 0.0):,.0f}" for row in rows.values())
        lines.append(f"| {kind} | {cells} |")
    for title, kind in (("products", "products"), ("the whole step", ALONE)):
        shares = [result["flops"] / row[kind] / result["peak"] for row in rows.values()]
        cells = " | ".join(f"{100 * share:.0f} %" for share in shares)
        lines.append(f"| {title}, share of the measured peak | {cells} |")
    peak_text = f"{result['peak'] / 1e9:,.0f} GFLOP/s"
    return "\n".join([*lines, f"Peak: {peak_text}, torch's code for {result['capability']}."])


if __name__ == "__main__":
    sys.exit(main())
