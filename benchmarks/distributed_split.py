"""Measured samples per second of our split against even layers and even parameters.

    python -m benchmarks.distributed_split [--processes 2 4] [--rounds 6] [--json]

Two uneven models: a BERT with a large vocabulary (masked language modelling: the head is half of
the work) and a T5 (decoder layers cost more than encoder layers, and the head more than both). The
blocks are profiled on this machine, the plans are made once (ours by the solver, the others by the
two rules, all priced by the same measurements), and one job per number of processes trains them
with 1 thread per process: all split alike but for the blocks of a stage, by turns in every round.
Losses of the first step are compared: they do not depend on the split.

4 processes on a machine of 2 cores share them: an idle stage then gives its core to a busy one, so
the advantage of a balanced split is smaller than on 4 cores. The table says so, and gives the
processor seconds of the busiest process: the bound on a step with a core for each process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import ipu_pipeline as ipp
from benchmarks.processes import Step, interleaved, is_started, ratio, start
from ipu_pipeline.backends.local.measure import local_machine, profile_blocks
from ipu_pipeline.backends.local.measure.cache import CACHE_VARIABLE
from ipu_pipeline.capture import capture, model_identity
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.backend import Workload
from ipu_pipeline.planner.price import counted_costs, make_plan
from ipu_pipeline.planner.search import Constraints, Partition, solve

MODELS: Mapping[str, tuple[str, transformers.PretrainedConfig]] = {
    "bert-mlm": (
        "masked-lm",
        transformers.BertConfig(
            vocab_size=40_000, hidden_size=256, num_hidden_layers=12, num_attention_heads=4,
            intermediate_size=1024,
        ),
    ),
    "t5": (
        "seq2seq-lm",
        transformers.T5Config(
            vocab_size=32_128, d_model=256, d_ff=1024, d_kv=64, num_layers=6, num_heads=4,
            decoder_start_token_id=0,
        ),
    ),
}  # fmt: skip
Split = tuple[tuple[str, ...], ...]


def even_layers(graph: BlockGraph, num_stages: int) -> Split:
    """Equal numbers of layers; what precedes them with the first, the rest with the last."""
    layers = [i for i, block in enumerate(graph.blocks) if block.kind == "layer"]
    return _cut(graph, [layers[len(layers) * s // num_stages] for s in range(1, num_stages)])


def even_parameters(graph: BlockGraph, num_stages: int) -> Split:
    """Cut where the running number of parameters is nearest to an even share."""
    sizes = (
        sum(graph.parameter_by_fqn[fqn].numel for fqn in block.parameters) for block in graph.blocks
    )
    total = [0, *accumulate(sizes)]
    shares = [total[-1] * stage / num_stages for stage in range(1, num_stages)]
    return _cut(graph, [min(range(1, len(total)), key=lambda c: abs(total[c] - s)) for s in shares])


def _cut(graph: BlockGraph, cuts: Sequence[int]) -> Split:
    bounds = [0, *cuts, len(graph.blocks)]
    return tuple(tuple(b.name for b in graph.blocks[i:j]) for i, j in pairwise(bounds))


BASELINES: Mapping[str, Callable[[BlockGraph, int], Split]] = {
    "even layers": even_layers,
    "even parameters": even_parameters,
}
SYSTEMS = ("ours", *BASELINES)


def build(name: str, samples: int, length: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model with the same weights every time, and a batch."""
    task, config = MODELS[name]
    return from_config(config, task, batch_size=samples, seq_length=length, device="cpu")


def make_plans(
    name: str, processes: int, arguments: argparse.Namespace
) -> dict[str, tuple[Plan, float]]:
    """Return plan and predicted seconds per step of every system."""
    model, example = build(name, arguments.micro_batch, arguments.seq_length)
    captured = capture(model, example)
    machine = local_machine(processes)
    times = profile_blocks(captured, example, num_devices=processes)
    work = Workload(
        captured.graph,
        machine,
        "1f1b",
        arguments.microbatches,
        settings={"tied": "exchange"},
        measured_s=times,
    )
    costs = counted_costs(work)
    limits = Constraints(
        num_stages=processes,
        num_microbatches=arguments.microbatches,
        tied="exchange",
        recompute="never",
        allow_serialize=False,
    )
    found: dict[str, Partition] = {"ours": solve(captured.graph, costs, machine, limits)}
    for system in SYSTEMS[1:]:
        split = BASELINES[system](captured.graph, processes)
        found[system] = solve(captured.graph, costs, machine, limits.with_stages(split))
    return {
        system: (made, made.objective_s)
        for system, partition in found.items()
        for made in [make_plan(model_identity(model), work, partition)]
    }


def plan_all(folder: Path, arguments: argparse.Namespace) -> None:
    """Profile, plan and write everything that the processes will run."""
    for processes in arguments.processes:
        for name in arguments.models:
            predicted = {}
            for system, (plan, seconds) in make_plans(name, processes, arguments).items():
                plan.save(folder / f"{name}-{processes}-{system}.json")
                predicted[system] = seconds
            (folder / f"{name}-{processes}.json").write_text(json.dumps(predicted))


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one model under every plan; every process calls this."""
    processes, folder = dist.get_world_size(), Path(arguments.plans)
    samples = arguments.micro_batch * arguments.microbatches
    _, batch = build(name, samples, arguments.seq_length)
    made = {}
    with contextlib.ExitStack() as stack:
        for system in SYSTEMS:
            model, _ = build(name, 1, arguments.seq_length)
            plan = Plan.load(folder / f"{name}-{processes}-{system}.json")
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
            made[system] = stack.enter_context(
                ipp.compile(
                    model, plan, target="distributed", optimizer=optimizer, self_check=False
                )
            )
        losses = {system: each.train_step(batch).loss for system, each in made.items()}
        worst = max(abs(loss / losses["ours"] - 1) for loss in losses.values())
        if worst > 1e-4:
            raise SystemExit(f"the plans train different models: first losses {losses}")
        steps: dict[str, Step] = {
            system: (lambda each=each: each.train_step(batch))  # type: ignore[misc]
            for system, each in made.items()
        }
        times = interleaved(steps, arguments.rounds, warmup=1)
        busiest = {system: max(times[system].cpu_by_rank()) for system in SYSTEMS}
        stages = {system: _blocks(each.plan) for system, each in made.items()}
    predicted = json.loads((folder / f"{name}-{processes}.json").read_text())
    return {
        "model": name,
        "processes": processes,
        "cores": len(os.sched_getaffinity(0)),
        "systems": {
            system: {
                "blocks": stages[system],
                "predicted_s": predicted[system],
                "measured_s": median(times[system].seconds),
                "busiest_cpu_s": busiest[system],
                "samples_per_s": samples / median(times[system].seconds),
                "seconds_over_ours": ratio(times[system].seconds, times["ours"].seconds),
            }
            for system in SYSTEMS
        },
    }


def _blocks(plan: Plan) -> list[int]:
    return [len(stage.blocks) for stage in plan.stages]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| model | processes | split | blocks per stage | predicted, s | measured, s | busiest "
        "process, CPU s | samples/s | seconds over ours (quartiles) |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        shared = row["processes"] > row["cores"]
        count = f"{row['processes']} on {row['cores']} cores" if shared else str(row["processes"])
        for system, found in row["systems"].items():
            over = found["seconds_over_ours"]
            lines.append(
                f"| {row['model']} | {count} | {system} | {'-'.join(map(str, found['blocks']))} | "
                f"{found['predicted_s']:.2f} | {found['measured_s']:.2f} | "
                f"{found['busiest_cpu_s']:.2f} | {found['samples_per_s']:.2f} | "
                f"x {over['median']:.2f} ({over['low']:.2f} to {over['high']:.2f}) |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and start the processes; in them, measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed_split")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plans", default="", help="folder of the plans; set in the processes")
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(given)
    transformers.logging.set_verbosity_error()
    if not is_started():
        return run_all(arguments, given)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [measure(name, arguments) for name in arguments.models]
    if dist.get_rank() == 0:
        results_of(Path(arguments.plans), dist.get_world_size()).write_text(json.dumps(rows))
    dist.destroy_process_group()
    return 0


def results_of(folder: Path, processes: int) -> Path:
    """Return where the job of so many processes leaves its rows."""
    return folder / f"results-{processes}.json"


def run_all(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    """Plan, start one job per number of processes, and print what they measured."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ[CACHE_VARIABLE] = name  # measure now, not when something was measured
        plan_all(folder, arguments)
        for count in arguments.processes:
            code = start("benchmarks.distributed_split", count, [*given, "--plans", name])
            if code:
                return code
            rows += json.loads(results_of(folder, count).read_text())
    print(json.dumps(rows, indent=1) if arguments.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
