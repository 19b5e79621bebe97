"""Constants of the GPU generations from a few published runs.

Fitted are the shares of the peaks that large products reach, one a generation and precision; the
other constants were chosen once, by round numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from benchmarks.gpu_runs import Run
from ipu_pipeline.ir.machine import KernelRates, Machine

# At most a tenth of the shared rows: of every source and generation a few.
FITTED_ROWS = frozenset(
    {
        "sc21-530B", "zb-1.5B-1F1B-m64", "zb-6.2B-1F1B-m32", "zb-14.6B-1F1B-m128",
        "vocab-8-4096-Baseline-32768", "vocab-16-2048-Vocab-1-65536",
        "vocab-artifact-2048-redis-32768", "vocab-artifact-4096-vocab-2-131072",
        "megatron-h100-119B", "bridge-26.04-pretrain-LLAMA3_70B-H100-FP8-64-gbs256",
        "bridge-26.02-pretrain-LLAMA3.1_405B-H100-FP8-1024-gbs1536",
        "bridge-26.04-pretrain-LLAMA3.1_405B-GB200-FP8-256-gbs1536",
        "bridge-26.04-pretrain-LLAMA3_70B-GB200-MXFP8-64-gbs256",
        "bridge-26.04-pretrain-LLAMA3_70B-GB200-NVFP4-64-gbs256",
        "bridge-26.04-pretrain-LLAMA3.1_405B-GB200-NVFP4-256-gbs1536",
        "bridge-25.11-pretrain-DeepSeekV3-GB200-BF16-256-gbs4096",
        "bridge-26.04-pretrain-LLAMA3.1_405B-GB300-FP8-256-gbs1536",
        "bridge-26.04-pretrain-LLAMA3.1_405B-GB300-MXFP8-256-gbs1536",
        "bridge-26.02-pretrain-LLAMA3_70B-GB300-NVFP4-64-gbs256",
        "bridge-25.11-pretrain-DeepSeekV3-GB300-BF16-256-gbs4096",
        "bridge-26.04-pretrain-Qwen3_235B_a22B-GB300-MXFP8-256-gbs8192",
    }
)  # fmt: skip
_ROUNDS = 2
Shares = Mapping[tuple[str, str], float]
_STEPS = (0.8, 0.87, 0.93, 0.97, 1.0, 1.03, 1.07, 1.15, 1.25)


def with_kernels(machine: Machine, kernels: KernelRates) -> Machine:
    """Return ``machine`` with other kernel rates on its first device, which is what is priced."""
    first = replace(machine.devices[0], kernels=kernels)
    return replace(machine, devices=(first, *machine.devices[1:]))


def fit(runs: Iterable[Run], known: dict[tuple[str, ...], float] | None = None) -> Shares:
    """Return the share of the peak by generation and precision that suits ``runs`` best.

    Args:
        runs: What to fit to.
        known: Results of earlier fits by the names of their runs, which are not made again.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        kernels = run.machine.devices[0].kernels
        if kernels is not None and run.published_s is not None:
            groups.setdefault((kernels.name, run.row.precision), []).append(run)
    known = {} if known is None else known
    for (_, precision), found in groups.items():
        names = tuple(run.row.id for run in found)
        if names not in known:
            known[names] = _best_share(precision, found)
    return {key: known[tuple(run.row.id for run in own)] for key, own in groups.items()}


def leave_one_source_out(runs: Sequence[Run]) -> dict[str, Any]:
    """Fit without each source and predict its runs of quality A.

    A generation or precision that no other source has takes the mean share of the others.
    """
    judged = [r for r in runs if r.row.quality == "A" and r.published_s is not None]
    found: dict[str, Any] = {}
    known: dict[tuple[str, ...], float] = {}
    for source in sorted({run.row.source for run in judged}):
        rest = [r for r in judged if r.row.source != source and r.row.id in FITTED_ROWS]
        shares = fit(rest, known)
        own = [run for run in judged if run.row.source == source]
        errors = [abs(_left_out_error(run, shares)) for run in own]
        found[source] = {"time_mean": round(fmean(errors), 4), "rows": len(own)}
    return found


def _left_out_error(run: Run, shares: Shares) -> float:
    kernels = run.machine.devices[0].kernels
    assert kernels is not None
    share = shares.get((kernels.name, run.row.precision))
    if share is None:
        same = [value for key, value in shares.items() if key[1] == run.row.precision]
        share = fmean(same or [*shares.values(), 1.0])
    return error_of(run, _with_share(kernels, run.row.precision, share))


def _with_share(kernels: KernelRates, precision: str, share: float) -> KernelRates:
    return replace(kernels, product_share={**kernels.product_share, precision: share})


def _best_share(precision: str, runs: Sequence[Run]) -> float:
    kernels = runs[0].machine.devices[0].kernels
    assert kernels is not None
    share = kernels.product_share[precision]
    for _ in range(_ROUNDS):
        tried = [min(1.0, share * step) for step in _STEPS]
        share = min(tried, key=lambda one: _error(kernels, precision, one, runs))
    return round(share, 3)


def _error(kernels: KernelRates, precision: str, share: float, runs: Sequence[Run]) -> float:
    changed = _with_share(kernels, precision, share)
    return fmean(error_of(run, changed) ** 2 for run in runs)


def error_of(run: Run, kernels: KernelRates) -> float:
    """Return the relative error of a run's seconds with other kernel rates."""
    assert run.published_s is not None
    return run.on(with_kernels(run.machine, kernels)).step_s() / run.published_s - 1
