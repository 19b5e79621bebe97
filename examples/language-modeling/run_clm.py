r"""Train a causal language model, split over pipeline stages.

    python examples/language-modeling/run_clm.py \
        --model_name_or_path examples/language-modeling/small --tokenizer_name out/demo_clm \
        --num_stages 2 --train_file out/demo_clm/train.txt \
        --validation_file out/demo_clm/validation.txt \
        --do_train --do_eval --block_size 64 --output_dir out/clm

Options are spelled as in transformers' own run_clm.py; ``--help`` lists them.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import ctrl_c  # noqa: F401 - from here on
import torch
from demo_model import load_model, load_tokenizer
from fine_tuning import prepare
from script_data import name_of, read_splits
from script_options import run_command_line
from text_run import TokenizerOptions
from torch import Tensor
from torch.nn.functional import cross_entropy
from trainer_run import TrainerJob, TrainerOptions, run_trainer
from transformers import Trainer, default_data_collator

from ipu_pipeline.train.arguments import option
from tasks.masked_lm import cut_text, text_column, texts_of
from tasks.samples import in_data


@dataclass(kw_only=True)
class Options(TrainerOptions, TokenizerOptions):
    """Everything that the script can be told."""

    block_size: int | None = option(
        default=None, help="Tokens of a sequence; default: those of the model, 1024 at most."
    )
    text_column_name: str | None = option(
        default=None, help="Column of the text; default: text, else the first column."
    )

    def _mistakes(self) -> tuple[tuple[bool, str], ...]:
        return (
            *super()._mistakes(),
            (self.block_size == 1, "--block_size 1 leaves no next token; give at least 2"),
        )


def run(options: Options) -> Trainer:
    """Train and evaluate a model that continues texts."""
    prepare(options)
    rows = read_splits(options)
    name = options.model_name_or_path
    tokenizer = load_tokenizer(options.tokenizer_name or name)
    model = load_model(name, "AutoModelForCausalLM")
    size = options.block_size or min(1024, tokenizer.model_max_length)
    data = {}
    for split, samples in rows.items():
        with in_data(name_of(split, options)):
            texts = texts_of(samples, text_column(samples, options))
            cut = cut_text(texts, tokenizer, size, "--block_size")
            cut.columns["labels"] = cut.columns["input_ids"]
            data[split] = cut
    job = TrainerJob(
        model, tokenizer, data, default_data_collator, scores, measured, main_metric="perplexity"
    )
    return run_trainer(options, job)


def measured(logits: Any, labels: Tensor) -> Tensor:
    """Keep of every token but the first whether it was guessed, and its loss.

    Args:
        logits: Of samples, tokens and vocabulary; or a tuple that begins with them.
        labels: Of samples and tokens.

    Returns:
        Samples, tokens but one, 2.
    """
    logits = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].float()
    expected = labels[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), expected, reduction="none")
    return torch.stack(((logits.argmax(-1) == expected).float(), losses), dim=-1)


def scores(found: Any) -> dict[str, float]:
    """Return the accuracy of the next token, and the perplexity."""
    right, loss = found.predictions.reshape(-1, 2).mean(0)
    return {"accuracy": float(right), "perplexity": math.exp(loss)}


if __name__ == "__main__":
    run_command_line(run, Options)
