"""Seconds per AdamW step of our kernel against torch's three ways, and the bandwidth reached.

    python -m benchmarks.kernel_adamw [--threads 2] [--rounds 15] [--json]

All optimizers step the same float32 weights and gradients, one after the other in every round, so
that the load of the machine falls on all alike; printed are medians, and medians of the rounds'
ratios. A step reads 16 bytes and writes 12 per weight. The bandwidth that this is held against is
that of ``a += 0.5 * b`` over arrays of 400 MB, which reads and writes memory in the same way.

Then ours alone with bfloat16 weights and gradients (22 bytes per weight; the averages are float32),
rounded to nearest and at random: what the random numbers cost.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from transformers import BertConfig, BertModel

from benchmarks.processes import interleaved
from ipu_pipeline.ops import extension
from ipu_pipeline.ops.adamw import AdamW

BERT = BertConfig()
MINILM = BertConfig(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)
# Weight, gradient and two averages are read; all but the gradient are written.
BYTES_PER_WEIGHT = {torch.float32: 4 * 4 + 3 * 4, torch.bfloat16: 2 + 2 + 2 * 4 + 2 + 2 * 4}
STREAM_ELEMENTS = 100_000_000

Step = Callable[[], Any]


def parameter_list(config: BertConfig, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Return random parameters of the shapes of a BERT, each with a gradient."""
    with torch.device("meta"):
        shapes = [p.shape for p in BertModel(config).parameters()]
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return parameters


def contestants(parameters: list[torch.nn.Parameter]) -> dict[str, Step]:
    """Return one step of each optimizer, ours first."""
    settings: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}
    return {
        "ours": AdamW(parameters, **settings).step,
        "torch foreach": torch.optim.AdamW(parameters, foreach=True, **settings).step,
        "torch fused": torch.optim.AdamW(parameters, fused=True, **settings).step,
        "torch loop": torch.optim.AdamW(parameters, foreach=False, **settings).step,
    }


def roundings(parameters: list[torch.nn.Parameter]) -> dict[str, Step]:
    """Return a step of ours that rounds to nearest, and one that rounds at random."""
    return {
        "nearest": AdamW(parameters, lr=1e-5).step,
        "stochastic": AdamW(parameters, lr=1e-5, stochastic_rounding=True).step,
    }


def stream_step() -> Step:
    """Return the array update whose bandwidth is the yardstick."""
    a, b = torch.zeros(STREAM_ELEMENTS), torch.ones(STREAM_ELEMENTS)
    return lambda: a.add_(b, alpha=0.5)


def measure(
    config: BertConfig,
    rounds: int,
    *,
    dtype: torch.dtype = torch.float32,
    make: Callable[[list[torch.nn.Parameter]], dict[str, Step]] = contestants,
) -> dict[str, Any]:
    """Return medians, and ratios to the first contestant, for one list of parameters."""
    parameters = parameter_list(config, dtype)
    count = sum(p.numel() for p in parameters)
    steps = make(parameters) | {"stream": stream_step()}
    times = {name: taken.seconds for name, taken in interleaved(steps, rounds).items()}
    stream = STREAM_ELEMENTS * 12 / statistics.median(times.pop("stream")) / 1e9
    first = next(iter(times.values()))
    return {
        "tensors": len(parameters),
        "weights": count,
        "stream_gb_per_s": stream,
        "optimizers": {
            name: {
                "ms": statistics.median(taken) * 1e3,
                "gb_per_s": count * BYTES_PER_WEIGHT[dtype] / statistics.median(taken) / 1e9,
                "times_the_first": _median_ratio(taken, first),
            }
            for name, taken in times.items()
        },
    }


def _median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def main(
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds that are timed.")] = 15,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a table or JSON."""
    torch.set_num_threads(threads)
    results: dict[str, Any] = {"kernels": extension.state().detail, "threads": threads}
    results["lists"] = {
        "BERT-base, float32": measure(BERT, rounds),
        "MiniLM, float32": measure(MINILM, rounds),
        "BERT-base, bfloat16": measure(BERT, rounds, dtype=torch.bfloat16, make=roundings),
    }
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    typer.echo(f"kernels: {results['kernels']}; {threads} threads")
    for name, result in results["lists"].items():
        typer.echo(
            f"{name}: {result['weights'] / 1e6:.1f} M weights in {result['tensors']} tensors; "
            f"stream {result['stream_gb_per_s']:.1f} GB/s"
        )
        for optimizer, row in result["optimizers"].items():
            typer.echo(
                f"  {optimizer:14} {row['ms']:8.1f} ms {row['gb_per_s']:6.1f} GB/s "
                f"{row['times_the_first']:6.2f} x the first"
            )


if __name__ == "__main__":
    typer.run(main)
