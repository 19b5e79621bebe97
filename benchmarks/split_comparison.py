"""Predicted step times of our split and of the baselines, for seven published architectures.

``python -m benchmarks.split_comparison [--machine NAME] [--schedule 1f1b] [--microbatches 64]``.
Models are built from their published sizes on the meta device; nothing is downloaded. A baseline
is priced by the same cost model as our split, with the options of its blocks chosen exactly; the
table gives its step time divided by ours, or ``no fit``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

import transformers

from benchmarks.baselines import BASELINES
from ipu_pipeline.capture import capture
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.options.cost_models import estimate
from ipu_pipeline.planner.search import Constraints, solve

DEVICE_COUNTS = (2, 4, 8, 16)
MODELS: dict[str, tuple[str, Callable[[], transformers.PretrainedConfig]]] = {
    "bert-base": ("question-answering", transformers.BertConfig),
    "bert-large": (
        "question-answering",
        lambda: transformers.BertConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        ),
    ),
    "gpt2": ("causal-lm", transformers.GPT2Config),
    "t5-base": (
        "seq2seq-lm",
        lambda: transformers.T5Config(
            d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0
        ),
    ),
    "lxmert-base": ("visual-question-answering", transformers.LxmertConfig),
    "vit-base": ("image-classification", transformers.ViTConfig),
    "whisper-small": (
        "speech-seq2seq",
        lambda: transformers.WhisperConfig(
            d_model=768, encoder_layers=12, decoder_layers=12, encoder_attention_heads=12,
            decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
        ),
    ),
}  # fmt: skip


def block_graph(name: str, batch_size: int, seq_length: int) -> BlockGraph:
    """Capture one of ``MODELS`` on the meta device."""
    task, make = MODELS[name]
    model, batch = from_config(make(), task, batch_size=batch_size, seq_length=seq_length)
    return capture(model, batch).graph


def compare(
    graph: BlockGraph, costs: GraphCosts, machine: Machine, constraints: Constraints
) -> dict[str, float | None]:
    """Return seconds per step by system, ``ours`` first; ``None`` where a split does not fit."""
    seconds: dict[str, float | None] = {}
    try:
        seconds["ours"] = solve(graph, costs, machine, constraints).objective
    except PartitionError:
        seconds["ours"] = None
    depth = min(len(machine.devices), len(graph.blocks))
    for name, split in BASELINES.items():
        try:
            stages = split(graph, costs, machine, depth)
            given = constraints.with_stages(stages)
            seconds[name] = solve(graph, costs, machine, given).objective
        except PartitionError:
            seconds[name] = None
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.split_comparison")
    parser.add_argument("--machine", default="a100-80g-x16", help="name or file")
    parser.add_argument("--schedule", default="1f1b", choices=("1f1b", "gpipe", "popart"))
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args(argv)
    whole = machine_by_name(arguments.machine)
    print("| model | devices | ours, ms/step | " + " | ".join(BASELINES) + " | solve, s |")
    print("|" + "---|" * (len(BASELINES) + 4))
    for name in arguments.models:
        graph = block_graph(name, arguments.micro_batch, arguments.seq_length)
        costs = estimate(graph, whole)
        for count in DEVICE_COUNTS:
            constraints = Constraints(
                num_microbatches=arguments.microbatches,
                schedule=arguments.schedule,
                tied="exchange",
            )
            start = perf_counter()
            part = replace(whole, devices=whole.devices[:count])
            seconds = compare(graph, costs, part, constraints)
            _print_row(name, count, seconds, perf_counter() - start)
    return 0


def _print_row(name: str, count: int, seconds: dict[str, float | None], elapsed_s: float) -> None:
    ours = seconds.pop("ours")
    cells = ["no fit" if s is None else f"x {s / ours:.3f}" if ours else f"{s * 1e3:.4g}"
             for s in seconds.values()]  # fmt: skip
    first = "no fit" if ours is None else f"{ours * 1e3:.5g}"
    row = (name, str(count), first, *cells, f"{elapsed_s:.2f}")
    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
