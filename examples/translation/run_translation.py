r"""Translate texts with a Transformers model, split over pipeline stages.

    python examples/translation/run_translation.py \
        --model_name_or_path examples/translation/small --tokenizer_name out/demo_translation \
        --num_stages 2 --source_lang en --target_lang de \
        --train_file out/demo_translation/train.jsonl \
        --validation_file out/demo_translation/validation.jsonl \
        --do_train --do_eval --predict_with_generate --output_dir out/translation

Options are spelled as in transformers' own run_translation.py; ``--help`` lists them.
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


@dataclass(kw_only=True)
class Options(TextToTextOptions):
    """Everything that the script can be told."""

    source_lang: str = option(help="Language to translate from: its key in the samples.")
    target_lang: str = option(help="Language to translate into.")


def run(options: Options) -> Trainer:
    """Train and evaluate a model that translates."""

    def pair(row: Row, where: str) -> tuple[str, str]:
        texts = require(row, "translation", dict, where)
        languages = (options.source_lang, options.target_lang)
        source, target = (require(texts, language, str, where) for language in languages)
        return source, target

    return run_text_to_text(options, pair, bleu, "bleu")


def bleu(found: Sequence[str], expected: Sequence[str]) -> Mapping[str, float]:
    """Return BLEU as sacrebleu computes it."""
    from torchmetrics.functional.text import sacre_bleu_score

    return {"bleu": float(sacre_bleu_score(list(found), [[text] for text in expected]))}


if __name__ == "__main__":
    run_command_line(run, Options)
