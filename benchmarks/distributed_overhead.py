"""What our layer costs over raw ``torch.distributed.pipelining`` with the same stages.

    python -m benchmarks.distributed_overhead [--rounds 12] [--schedules 1f1b gpipe] [--json]

One job of 2 processes with 1 thread each. A BERT for question answering is trained by our
distributed target, and by torch's ``PipelineStage`` and the same schedule over stages written by
hand, cut at the same blocks: the same weights, batch, optimizer and number of threads. Both step in
every round, by turns first; the overhead is the median of the rounds' ratios of seconds per step,
minus 1, with its quartiles; printed too is the overhead in processor time of both processes, which
leaves out waiting. Before anything is timed both must give the same loss.

Raw torch does less: it neither sums the loss for all ranks, nor computes a norm, nor can it say
who failed. With dropout on it also draws other masks: torch's, which depend on the split.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import BertConfig, BertForQuestionAnswering

import ipu_pipeline as ipp
from benchmarks.processes import everyones, from_first, interleaved, is_started, ratio, start
from benchmarks.raw_pipeline import Batch, Raw
from ipu_pipeline.backends.cluster.layout import torch_schedule, torch_schedules

PROCESSES = 2


def make_batch(config: BertConfig, samples: int, length: int) -> Batch:
    """Return a random batch with some padding."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(length // 2, length + 1, (samples, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    ids = torch.randint(0, config.vocab_size, (samples, length), generator=generator)
    positions = torch.randint(0, length // 2, (2, samples), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
        "start_positions": positions[0],
        "end_positions": positions[1],
    }


def measure(arguments: argparse.Namespace, schedule: str, dropout: float) -> dict[str, Any]:
    """Return samples per second of both, and the overhead, for one schedule."""
    config = BertConfig(
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        intermediate_size=4 * arguments.hidden,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(BertForQuestionAnswering(config).train())
    batch = make_batch(config, arguments.micro_batch * arguments.microbatches, arguments.seq_length)
    example = {name: value[: arguments.micro_batch] for name, value in batch.items()}
    stages = PROCESSES * torch_schedule(schedule).stages_per_device[0]
    plan = from_first(
        lambda: ipp.plan(models[0], example, num_stages=stages, microbatches=arguments.microbatches)
    )
    optimizer = torch.optim.AdamW(models[0].parameters(), lr=1e-5)
    ours = ipp.compile(
        models[0], plan, target="distributed", optimizer=optimizer, schedule=schedule,
        self_check=False,
    )  # fmt: skip
    raw = Raw(
        models[1],
        [stage.blocks for stage in plan.stages],
        schedule,
        partial(torch.optim.AdamW, lr=1e-5),
    )
    with ours:
        first = (
            ours.train_step(batch).loss,
            sum(everyones(raw.step(batch, arguments.microbatches))),
        )
        if dropout == 0 and abs(first[0] / first[1] - 1) > 1e-5:
            raise SystemExit(f"the stages are not the same: losses {first}")
        steps: dict[str, Callable[[], object]] = {
            "ours": lambda: ours.train_step(batch),
            "raw": lambda: raw.step(batch, arguments.microbatches),
        }
        times = interleaved(steps, arguments.rounds)
    samples = len(batch["input_ids"])
    relative = ratio(times["ours"].seconds, times["raw"].seconds)
    cpu = [sum(times[name].cpu_by_rank()) for name in steps]
    return {
        "schedule": schedule,
        "dropout": dropout,
        "stages": [len(stage.blocks) for stage in plan.stages],
        "ours_samples_per_s": samples / median(times["ours"].seconds),
        "raw_samples_per_s": samples / median(times["raw"].seconds),
        "overhead_percent": {name: 100 * (value - 1) for name, value in relative.items()},
        "cpu_overhead_percent": 100 * (cpu[0] / cpu[1] - 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes; in them, measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed_overhead")
    names = [kind.name for kind in torch_schedules() if kind.stages_per_device != (2,)]
    parser.add_argument(
        "--schedules", nargs="+", choices=names, default=["1f1b", "gpipe", "interleaved"]
    )
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(given)
    if not is_started():
        return start("benchmarks.distributed_overhead", PROCESSES, given)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [
        measure(arguments, schedule, dropout)
        for schedule in arguments.schedules
        for dropout in arguments.dropout
    ]
    if dist.get_rank() == 0:
        print(json.dumps(rows, indent=1) if arguments.json else table(rows))
    dist.destroy_process_group()
    return 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| schedule | dropout | ours, samples/s | raw | overhead (quartiles) | processor time |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        over = row["overhead_percent"]
        lines.append(
            f"| {row['schedule']} | {row['dropout']} | {row['ours_samples_per_s']:.2f} | "
            f"{row['raw_samples_per_s']:.2f} | {over['median']:+.1f} % "
            f"({over['low']:+.1f} to {over['high']:+.1f}) | "
            f"{row['cpu_overhead_percent']:+.1f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
