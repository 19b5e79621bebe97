r"""Classify sounds with a Transformers model, split over pipeline stages.

    python examples/audio-classification/run_audio_classification.py \
        --model_name_or_path examples/audio-classification/small --num_stages 2 \
        --train_file out/demo_words/train.jsonl --validation_file out/demo_words/validation.jsonl \
        --do_train --do_eval --max_duration_in_seconds 0.75 --output_dir out/words

Options are spelled as in transformers' own run_audio_classification.py; ``--help`` lists them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import ctrl_c  # noqa: F401 - from here on
from classification_run import ClassOptions, classify
from script_options import run_command_line

from tasks.speech import SoundOptions


@dataclass(kw_only=True)
class Options(ClassOptions, SoundOptions):
    """Everything that the script can be told."""


def run(options: Options) -> Any:
    """Train and evaluate a classifier of sounds; longer ones are cut."""
    features = partial(options.sound, cut=True)
    return classify(options, "AutoModelForAudioClassification", "AutoFeatureExtractor", features)


if __name__ == "__main__":
    run_command_line(run, Options)
