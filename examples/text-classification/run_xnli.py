r"""Say whether a text supports a claim, in many languages, with a model split over stages.

    python examples/text-classification/run_xnli.py --model_name_or_path minilm --num_stages 2 \
        --language de --train_file out/demo_xnli/train.csv \
        --validation_file out/demo_xnli/validation.csv --do_train --do_eval --output_dir out/xnli

Files have the columns language, premise, hypothesis and label; without files XNLI is read from the
hub. Options are spelled as in transformers' own run_xnli.py; ``--help`` lists them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import ctrl_c  # noqa: F401 - from here on
from script_data import name_of, read_splits
from script_options import run_command_line
from script_run import split_of
from text_run import TextClassOptions, accuracy, classify_texts
from transformers import Trainer

from ipu_pipeline.errors import DatasetError
from ipu_pipeline.train.arguments import option
from tasks.samples import Rows, load_hub_rows

HUB = "facebook/xnli"


@dataclass(kw_only=True)
class Options(TextClassOptions):
    """Everything that the script can be told."""

    language: str = option(help="Language to evaluate, such as de.")
    train_language: str | None = option(
        default=None, help="Language to train; default: --language."
    )
    text_column_names: str | None = option(
        default="premise,hypothesis", help="The columns of the text and of the claim."
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_file is None and self.validation_file is None:
            self.dataset_name = HUB
        super().__post_init__()


def run(options: Options) -> Trainer:
    """Train and evaluate a model."""
    return classify_texts(options, partial(read, options), accuracy, "accuracy")


def read(options: Options) -> Mapping[str, Rows]:
    """Return the samples of every split in its language.

    Raises:
        DatasetError: The data cannot be read, or has none in a language.
    """
    languages = {
        "train": options.train_language or options.language,
        "validation": options.language,
    }
    if options.dataset_name is not None:
        return {
            split: split_of(load_hub_rows(options.dataset_name, languages[split]), split, options)[
                : options.source(split)[1]
            ]
            for split in options.splits
        }
    found = {}
    for split, rows in read_splits(options).items():
        found[split] = [row for row in rows if row.get("language") == languages[split]]
        if not found[split]:
            raise DatasetError(
                f"{name_of(split, options)} has no row whose column 'language' is "
                f"{languages[split]!r}; say another --language, or name the language of every row"
            )
    return found


if __name__ == "__main__":
    run_command_line(run, Options)
