r"""Pretrain Wav2Vec2 on speech without text, split over pipeline stages.

    python examples/speech-pretraining/run_wav2vec2_pretraining.py \
        --model_name_or_path examples/speech-pretraining/small --num_stages 2 \
        --train_file out/demo_numbers/train.jsonl \
        --validation_file out/demo_numbers/validation.jsonl \
        --do_train --do_eval --max_duration_in_seconds 1.4 --output_dir out/wav2vec2

Options are spelled as in transformers' own run_wav2vec2_pretraining_no_trainer.py; ``--help``
lists them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import ctrl_c  # noqa: F401 - from here on
from demo_model import load_model, load_processor
from fine_tuning import prepare
from script_data import media_data, read_splits
from script_options import run_command_line
from trainer_run import TrainerJob, TrainerOptions, run_trainer

from ipu_pipeline.train.arguments import option
from tasks.contrastive import (
    LABELS,
    ContrastiveCollator,
    ContrastiveTrainer,
    Temperature,
    guessed,
    share_guessed,
)
from tasks.speech import SoundOptions


@dataclass(kw_only=True)
class Options(TrainerOptions, SoundOptions):
    """Everything that the script can be told."""

    max_gumbel_temperature: float = option(default=2.0, help="Of the first step.")
    min_gumbel_temperature: float = option(default=0.5, help="The least.")
    gumbel_temperature_decay: float = option(default=0.999995, help="Its factor in every step.")


def run(options: Options) -> Any:
    """Train and evaluate; the score is how often the right code is told from wrong ones."""
    prepare(options)
    options.label_names = LABELS
    rows = read_splits(options)
    name = options.model_name_or_path
    extractor = load_processor(name, "AutoFeatureExtractor")
    model = load_model(name, "AutoModelForPreTraining")
    temperature = Temperature(
        options.max_gumbel_temperature,
        options.min_gumbel_temperature,
        options.gumbel_temperature_decay,
    )
    job = TrainerJob(
        model,
        extractor,
        media_data(options, rows, lambda row, folder: options.sound(row, folder, extractor)),
        ContrastiveCollator(model),
        share_guessed,
        guessed,
        "accuracy",
        ContrastiveTrainer,
        [temperature],
    )
    return run_trainer(options, job)


if __name__ == "__main__":
    run_command_line(run, Options)
