"""Fine-tune the demo's model with float32 weights, and with bfloat16 weights rounded two ways.

The training of ``make demo`` (MiniLM, question answering, two stages) with a small learning rate,
three times from the same weights with the same data, dropout keys and schedule: float32 weights;
bfloat16 weights rounded at random (StochasticRoundingAdamW, whose running averages are float32);
bfloat16 weights rounded to nearest (torch.optim.AdamW, whose averages are bfloat16). Everything
else of a bfloat16 model is bfloat16: activations, gradients and their sums.

    python -m benchmarks.stochastic_rounding --train-file out/demo_data/train.json \
        [--steps 150] [--learning-rate 2e-5] [--seeds 1,2,3] [--output FILE]

Printed for every seed: the training loss, mean over the last steps, and the loss on held-out
windows of the final weights, computed in float32; each also relative to float32's.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "common"))

from demo_model import load_model_and_tokenizer

import ipu_pipeline as ipp
from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.files import check_outputs, write_text
from ipu_pipeline.train import TrainingArguments, build_optimizer, train
from tasks.question_answering import (
    QuestionAnsweringDataset,
    build_features,
    read_squad,
)

VARIANTS: dict[str, tuple[torch.dtype, bool]] = {
    "float32": (torch.float32, False),
    "bfloat16, stochastic": (torch.bfloat16, True),
    "bfloat16, nearest": (torch.bfloat16, False),
}
MICRO_BATCH = 4
MICROBATCHES = 2
HELD_OUT = 256


@dataclass(frozen=True)
class Setup:
    """What all runs share.

    Attributes:
        train_file: SQuAD v1.1 file that ``make_demo_data.py`` wrote.
        steps: Optimizer steps of 8 windows.
        learning_rate: Peak; 10 % warm-up, then linear to 0.
        smooth: Steps at the end whose losses are averaged.
    """

    train_file: str
    steps: int
    learning_rate: float
    smooth: int


def run(setup: Setup, dtype: torch.dtype, *, stochastic_rounding: bool, seed: int) -> list[float]:
    """Train once; return the loss of every step, and last the held-out loss."""
    torch.manual_seed(seed)  # the new head's weights
    model, tokenizer = load_model_and_tokenizer("minilm")
    windows = build_features(
        read_squad(setup.train_file), tokenizer, max_seq_length=96, doc_stride=32
    )
    model.to(dtype)
    example = {name: column[:MICRO_BATCH] for name, column in windows.tensors.items()}
    plan = ipp.plan(model, example, num_stages=2, microbatches=MICROBATCHES)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=setup.steps,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=MICROBATCHES,
            learning_rate=setup.learning_rate,
            warmup_ratio=0.1,
            weight_decay=0.01,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        executable = ipp.compile(
            model,
            plan,
            target="local",
            optimizer=build_optimizer(model, arguments),
            **asdict(arguments.execution_options()),
        )
        try:
            to_train = Subset(windows, range(HELD_OUT, len(windows)))
            result = train(executable, to_train, arguments, tokenizer=tokenizer)
        finally:
            executable.close()
    losses = [entry["loss"] for entry in result.log_history if "loss" in entry]
    return [*losses, held_out_loss(model, windows)]


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, windows: QuestionAnsweringDataset) -> float:
    """Return the mean loss on windows that no run trains on, computed in float32."""
    model.float().eval()
    losses = []
    for first in range(0, HELD_OUT, 32):
        batch = {name: column[first : first + 32] for name, column in windows.tensors.items()}
        losses.append(float(model(**batch).loss))
    return statistics.fmean(losses)


def compare(setup: Setup, seed: int) -> dict[str, Any]:
    """Train all variants from one seed."""
    rows: dict[str, Any] = {}
    for name, (dtype, stochastic) in VARIANTS.items():
        *losses, held_out = run(setup, dtype, stochastic_rounding=stochastic, seed=seed)
        rows[name] = {
            "first_loss": statistics.fmean(losses[: setup.smooth]),
            "final_loss": statistics.fmean(losses[-setup.smooth :]),
            "held_out_loss": held_out,
            "losses": losses,
        }
        for key in ("final_loss", "held_out_loss"):
            rows[name][f"{key}_difference"] = rows[name][key] / rows["float32"][key] - 1
        typer.echo(f"seed {seed}: {in_words(name, rows[name])}")
    return rows


def in_words(name: str, row: dict[str, Any]) -> str:
    """Return one run as a line."""
    return (
        f"{name:22} loss {row['first_loss']:.4f} -> {row['final_loss']:.4f} "
        f"({row['final_loss_difference']:+.2%} of float32's), held out "
        f"{row['held_out_loss']:.4f} ({row['held_out_loss_difference']:+.2%})"
    )


def mean_difference(results: dict[int, dict[str, Any]], name: str, key: str) -> float:
    """Return the relative difference to float32's mean, both averaged over the seeds."""
    own = statistics.fmean(rows[name][key] for rows in results.values())
    return own / statistics.fmean(rows["float32"][key] for rows in results.values()) - 1


def main(
    train_file: Annotated[Path, typer.Option(help="train.json of make_demo_data.py.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run.")] = 150,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    smooth: Annotated[int, typer.Option(help="Last steps whose loss is averaged.")] = 25,
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "1,2,3",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file for all losses.")] = None,
    force: Annotated[bool, typer.Option(help="Replace that file.")] = False,  # noqa: FBT002 - an option
) -> None:
    """Compare the three ways for several seeds."""
    from transformers.utils.logging import disable_progress_bar

    try:
        check_outputs({"--output": output}, force=force)
    except PipelineError as error:
        sys.exit(f"error: {error}")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(threads)
    setup = Setup(str(train_file), steps, learning_rate, smooth)
    results = {}
    for seed in map(int, seeds.split(",")):
        results[seed] = compare(setup, seed)
        if output is not None:
            content = {"setup": asdict(setup), "seeds": results}
            write_text(output, json.dumps(content, indent=1))
    for name in VARIANTS:
        typer.echo(
            f"all seeds: {name:22} final loss "
            f"{mean_difference(results, name, 'final_loss'):+.2%} of float32's, held out "
            f"{mean_difference(results, name, 'held_out_loss'):+.2%}"
        )


if __name__ == "__main__":
    typer.run(main)
