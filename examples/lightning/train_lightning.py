"""Train through a pipeline in Lightning: the module below is the recipe, the rest is a small task.

    python examples/lightning/train_lightning.py --output_dir out/lightning --max_steps 60

Lightning clears the gradients between ``training_step`` and ``backward``, and the pipeline makes
them in ``training_step``: so that is where they are cleared, and the two hooks after it do nothing.
Clipping, schedulers, loggers, callbacks, checkpoints, ``max_steps`` and ``ckpt_path`` are
Lightning's own. ``accumulate_grad_batches`` stays 1: microbatches are the plan's.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

import ipu_pipeline as ipp
from ipu_pipeline.errors import OutputError, first_line
from ipu_pipeline.ir.files import make_folder, named
from ipu_pipeline.ir.limits import check_counts
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.train.arguments import num_processes

MICRO_BATCH, MICROBATCHES, LENGTH, VOCAB = 4, 4, 16, 50


class PipelineModule(L.LightningModule):
    """A model that returns a loss, trained through the stages of a plan."""

    def __init__(self, model: torch.nn.Module, plan: Plan, steps: int, seed: int = 42) -> None:
        super().__init__()
        self.model, self.steps = model, steps
        self.executable = ipp.compile(model, plan, seed=seed)
        self.begun = False

    def on_train_start(self) -> None:
        """Note that what was to be resumed is loaded."""
        self.begun = True

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule, which moves every step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = get_linear_schedule_with_warmup(optimizer, 0, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch of all microbatches; their gradients are made here."""
        self.zero_grad()
        self.executable.global_step = self.global_step  # random numbers follow it, also resumed
        loss = self.executable.forward_backward(batch)
        self.log("train_loss", loss)
        return torch.tensor(loss, requires_grad=True)

    def backward(self, loss: Tensor) -> None:
        """Leave the gradients as ``training_step`` made them."""

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Leave the gradients as ``training_step`` made them."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Log loss and accuracy of one batch."""
        result = self.executable.eval_step(batch)
        labels = batch["labels"]
        accuracy = (result.outputs["logits"].argmax(-1) == labels).float().mean()
        self.log_dict({"val_loss": result.loss, "accuracy": accuracy}, batch_size=len(labels))


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


def main(argv: list[str] | None = None) -> L.Trainer:
    """Train, validate; return Lightning's trainer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default="out/lightning")
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--num_stages", type=int, default=2)
    parser.add_argument("--ckpt_path")
    options = parser.parse_args(argv)
    try:
        check_counts(options, {"max_steps": "steps", "num_stages": "num_stages"})
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

    L.seed_everything(42, verbose=False)
    model = small_model(options.dropout)
    train = DataLoader(rows(256, seed=1), batch_size=MICRO_BATCH * MICROBATCHES)
    validation = DataLoader(rows(96, seed=2), batch_size=32)
    microbatch = {name: value[:MICRO_BATCH] for name, value in next(iter(train)).items()}
    plan = ipp.plan(model, microbatch, num_stages=options.num_stages, microbatches=MICROBATCHES)
    module = PipelineModule(model, plan, options.max_steps)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=options.max_steps,
        default_root_dir=options.output_dir,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        callbacks=[
            # Once per epoch: Lightning resumes in the middle of one from its first batch again.
            L.pytorch.callbacks.ModelCheckpoint(f"{options.output_dir}/checkpoints", save_top_k=-1)
        ],
    )
    with module.executable:
        try:
            trainer.fit(module, train, validation, ckpt_path=options.ckpt_path, weights_only=True)
        except Exception as error:  # of the system, pickle and torch
            if module.begun or not options.ckpt_path:
                raise
            parser.error(
                f"cannot resume from {named(options.ckpt_path)} ({type(error).__name__}: "
                f"{first_line(error)[:200]}); give a file of output_dir/checkpoints"
            )
        trainer.validate(module, validation)
    return trainer


if __name__ == "__main__":
    main()
