"""What a short last batch costs in the distributed target, and what comparing batches costs.

Under torchrun, two processes, a BERT of six layers, 4 microbatches of 4 x 64 tokens:

    torchrun --nproc-per-node 2 -m benchmarks.short_batches

Medians over rounds; every round runs all cases in some order. A short batch of 14 samples is 3 full
microbatches and one of 2: two runs of the schedule. Alone, its samples are 0.875 of a full one.
"""

from __future__ import annotations

import random
import sys
import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers

import ipu_pipeline as ipp
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.stages.batch import Microbatch

ROUNDS = 21
MICRO, MICROBATCHES, LENGTH = 4, 4, 64
FULL = MICRO * MICROBATCHES


def main() -> None:
    """Print the figures from the first rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    made, batch = _compiled()
    with made:
        cases = {"full batch": FULL, "3 full": 3 * MICRO, "3 full and a short": FULL - 2}
        firsts = {name: _step(made, batch, size) for name, size in cases.items()}
        cases["full, not compared"] = FULL
        found: dict[str, list[float]] = {name: [] for name in cases}
        compared: list[float] = []
        check = made._passes.batch_check.check
        for round_ in range(ROUNDS):
            for name in random.Random(round_).sample(list(cases), len(cases)):
                made._passes.batch_check.check = (lambda *_: None) if "not" in name else check
                found[name].append(_step(made, batch, cases[name]))
            made._passes.batch_check.check = check
            compared.append(_comparison(made, batch))
        captures = [_capture(made, batch, size) for size in (1, 3)]
    if dist.get_rank() == 0:
        _report(firsts, found, compared, captures)


def _compiled() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.BertConfig(
        vocab_size=2000,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
    )
    task = "question-answering"
    sizes: dict[str, Any] = {"seq_length": LENGTH, "device": "cpu"}
    model, example = from_config(config, task, batch_size=MICRO, **sizes)
    _, batch = from_config(config, task, batch_size=FULL, **sizes)
    plan = ipp.plan(model, example, num_stages=2, microbatches=MICROBATCHES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return ipp.compile(model, plan, target="distributed", optimizer=optimizer), batch


def _step(made: Any, batch: dict[str, torch.Tensor], size: int) -> float:
    part = {name: value[:size] for name, value in batch.items()}
    dist.barrier()
    started = time.perf_counter()
    made.train_step(part)
    return time.perf_counter() - started


def _capture(made: Any, batch: dict[str, torch.Tensor], size: int) -> float:
    """Return the seconds that a microbatch of a new size takes before its first run."""
    part = {name: value[:size] for name, value in batch.items()}
    dist.barrier()
    started = time.perf_counter()
    made.model.train()
    with torch.enable_grad():
        made._passes.cache.prepare([Microbatch(0, part, size, 1.0)])
    return time.perf_counter() - started


def _comparison(made: Any, batch: dict[str, torch.Tensor], times: int = 50) -> float:
    """Return the seconds of one comparison on the slowest rank."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(times):
        made._passes.batch_check.check("training", 0, batch)
    seconds = torch.tensor([(time.perf_counter() - started) / times])
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def _report(
    firsts: dict[str, float],
    found: dict[str, list[float]],
    compared: list[float],
    captures: list[float],
) -> None:
    full = found["full batch"]
    lines = [f"{'case':20} {'first ms':>9} {'median ms':>10} {'of a full step':>15}"]
    for name, seconds in found.items():
        share = median(a / b for a, b in zip(seconds, full, strict=True))
        first = f"{firsts[name] * 1e3:9.0f}" if name in firsts else " " * 9
        lines.append(f"{name:20} {first} {median(seconds) * 1e3:10.1f} {share:15.3f}")
    lines.append(f"capture of a new shape: {median(captures) * 1e3:.0f} ms")
    lines.append(f"one comparison alone: {median(compared) * 1e6:.0f} us")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
