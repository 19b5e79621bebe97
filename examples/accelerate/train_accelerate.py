"""Train through a pipeline in an accelerate loop: ``train`` is the recipe, the rest a small task.

    python examples/accelerate/train_accelerate.py --output_dir out/accelerate --max_steps 60

``forward_backward`` stands where ``accelerator.backward(model(**batch).loss)`` stood. Everything
else is accelerate's: prepared loaders and schedulers, clipping, trackers, ``save_state``.
Precision is the executable's (``ipp.compile(precision="bf16")``), not the accelerator's.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

import ipu_pipeline as ipp
from ipu_pipeline.errors import CheckpointError, OutputError, first_line
from ipu_pipeline.ir.files import make_folder, named
from ipu_pipeline.ir.limits import check_counts
from ipu_pipeline.train.arguments import num_processes

MICRO_BATCH, MICROBATCHES, LENGTH, VOCAB = 4, 4, 16, 50


def train(
    model: torch.nn.Module, loader: Any, options: argparse.Namespace, accelerator: Accelerator
) -> list[float]:
    """Train for ``max_steps``, from where ``resume_from`` stopped if it is given."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, options.max_steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    step, losses = 0, []
    if options.resume_from:
        resume(accelerator, options.resume_from)
        step = scheduler.scheduler.last_epoch
    microbatch = {name: value[:MICRO_BATCH] for name, value in next(iter(loader)).items()}
    plan = ipp.plan(model, microbatch, num_stages=options.num_stages, microbatches=MICROBATCHES)
    with ipp.compile(model, plan, seed=42) as executable:
        while step < options.max_steps:
            epoch = accelerator.skip_first_batches(loader, step % len(loader))
            for batch in islice(epoch, options.max_steps - step):
                executable.global_step = step  # random numbers follow it, also resumed
                losses.append(executable.forward_backward(batch))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                step += 1
                accelerator.log({"train_loss": losses[-1]}, step=step)
                if step % options.save_steps == 0:
                    accelerator.save_state(str(Path(options.output_dir) / f"step-{step}"))
        result = executable.eval_step(next(iter(DataLoader(rows(96, seed=2), batch_size=96))))
        accelerator.print(f"step {step}: loss {losses[-1]:.4f}, evaluation {result.loss:.4f}")
    return losses


def resume(accelerator: Accelerator, folder: str) -> None:
    """Load what ``save_state`` wrote.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    try:
        accelerator.load_state(folder)
    except Exception as error:  # of the system, pickle, safetensors and torch
        raise CheckpointError(
            f"cannot resume from {named(folder)} ({type(error).__name__}: "
            f"{first_line(error)[:200]}); give a folder step-N of this script's output_dir"
        ) from error


def rows(size: int, seed: int) -> list[dict[str, Tensor]]:
    """Random tokens; the label is the third of the vocabulary that the first one is from."""
    ids = torch.randint(2, VOCAB, (size, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row[0] * 3 // VOCAB} for row in ids]


def small_model(dropout: float) -> torch.nn.Module:
    """Return a BERT of three layers."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def main(argv: list[str] | None = None) -> list[float]:
    """Train; return the losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default="out/accelerate")
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--save_steps", type=int, default=20)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--num_stages", type=int, default=2)
    parser.add_argument("--resume_from")
    options = parser.parse_args(argv)
    try:
        check_counts(
            options, {"max_steps": "steps", "save_steps": "steps", "num_stages": "num_stages"}
        )
        if not 0 <= options.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {options.dropout}")
        if num_processes() > 1:
            raise ValueError(
                f"this recipe runs all stages in one process, and {num_processes()} were started; "
                "start it without torchrun, or use ipu_pipeline.train.PipelineTrainer"
            )
        make_folder("--output_dir", options.output_dir)
    except (OutputError, ValueError) as error:
        parser.error(str(error))
    accelerator = Accelerator(cpu=True)
    set_seed(42)
    loader = DataLoader(rows(256, seed=1), batch_size=MICRO_BATCH * MICROBATCHES)
    try:
        return train(small_model(options.dropout), loader, options, accelerator)
    except CheckpointError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
