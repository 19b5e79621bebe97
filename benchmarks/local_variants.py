"""Ways that the local target could run its stages, against how it does: pinned, and compiled.

    python -m benchmarks.local_variants [--workload bert-small-qa] [--layers 6] [--precision bf16]

Two stages on two threads, steps of all variants in turns; ratios are of seconds, above 1 is slower:

- ``as it is``, twice: their ratio is the noise;
- ``pinned``: the thread of stage ``i`` may run on core ``i`` only;
- ``compiled``: ``torch.compile`` of every encoder layer, without dropout, whose keys would have it
  compiled again in every microbatch; against ``no dropout``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any
from unittest import mock

import torch
import transformers

import ipu_pipeline as ipp
from benchmarks.processes import interleaved, ratio
from benchmarks.suite.material import make_batch, make_material
from benchmarks.suite.workloads import Workload, load
from ipu_pipeline.ops.threads import take_threads

# What each variant is compared with.
BASES = {
    "as it is": "as it is",
    "as it is, again": "as it is",
    "pinned": "as it is",
    "no dropout": "no dropout",
    "compiled": "no dropout",
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STAGES = 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workload", choices=("bert-small-qa", "bert-base-qa"),
                        default="bert-small-qa")  # fmt: skip
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(STAGES)
    workload = load().workloads[options.workload]
    config = {**workload.config, "num_hidden_layers": options.layers}
    workload = replace(workload, config=config, microbatches=options.microbatches)
    steps = {name: _step(name, workload, options.precision) for name in BASES}
    first = {}
    for name, step in steps.items():
        with _pinned() if name == "pinned" else contextlib.nullcontext():
            first[name] = interleaved({name: step}, rounds=1, warmup=0)[name].seconds[0]
    times = {name: found.seconds for name, found in interleaved(steps, options.rounds).items()}
    lines = [f"{'variant':16} {'first s':>8} {'median s':>9} {'ratio (quartiles)':>22}  to"]
    for name, base in BASES.items():
        found = ratio(times[name], times[base])
        spread = f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
        lines.append(
            f"{name:16} {first[name]:8.1f} {median(times[name]):9.3f} {spread:>22}  {base}"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def _step(name: str, workload: Workload, precision: str) -> Callable[[], object]:
    if BASES[name] == "no dropout":
        workload = replace(workload, config={**workload.config, **NO_DROPOUT})
    material = make_material(workload, precision)
    model: Any = material.model
    plan = ipp.plan(model, material.example, num_stages=STAGES, microbatches=workload.microbatches)
    executable = ipp.compile(
        model, plan, optimizer=material.optimizer, precision=material.precision, self_check=False
    )
    if name == "compiled":
        for layer in model.bert.encoder.layer:
            layer.compile()
    batch = make_batch(workload, workload.microbatches)
    return lambda: executable.train_step(batch)


def _pinned() -> Any:
    """Return a context in which threads of stages start on a core of their own each."""
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))

    def take_core_and_threads(count: int) -> None:
        os.sched_setaffinity(0, {next(cores)})
        take_threads(count)

    return mock.patch("ipu_pipeline.backends.local.runner.take_threads", take_core_and_threads)


if __name__ == "__main__":
    main()
