r"""Summarize texts with a Transformers model, split over pipeline stages.

    python examples/summarization/run_summarization.py \
        --model_name_or_path examples/summarization/small --tokenizer_name out/demo_summaries \
        --num_stages 2 --train_file out/demo_summaries/train.jsonl \
        --validation_file out/demo_summaries/validation.jsonl \
        --do_train --do_eval --predict_with_generate --output_dir out/summaries

Options are spelled as in transformers' own run_summarization.py; ``--help`` lists them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import ctrl_c  # noqa: F401 - from here on
from script_options import run_command_line
from seq2seq_run import TextToTextOptions, run_text_to_text
from transformers import Trainer

from ipu_pipeline.train.arguments import option
from tasks.samples import Row, require

KEYS = ("rouge1", "rouge2", "rougeL")


@dataclass(kw_only=True)
class Options(TextToTextOptions):
    """Everything that the script can be told."""

    text_column: str = option(default="text", help="Column of the texts.")
    summary_column: str = option(default="summary", help="Column of the summaries.")


def run(options: Options) -> Trainer:
    """Train and evaluate a model that summarizes."""

    def pair(row: Row, where: str) -> tuple[str, str]:
        columns = (options.text_column, options.summary_column)
        text, summary = (require(row, column, str, where) for column in columns)
        return text, summary

    return run_text_to_text(options, pair, rouge, "rougeL")


def rouge(found: Sequence[str], expected: Sequence[str]) -> Mapping[str, float]:
    """Return ROUGE-1, -2 and -L (F1)."""
    from torchmetrics.functional.text import rouge_score

    scores = rouge_score(list(found), list(expected), rouge_keys=KEYS)
    return {key: float(scores[f"{key}_fmeasure"]) for key in KEYS}


if __name__ == "__main__":
    run_command_line(run, Options)
