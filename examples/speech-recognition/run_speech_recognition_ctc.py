r"""Recognise speech by CTC with a Transformers model, split over pipeline stages.

    python examples/speech-recognition/run_speech_recognition_ctc.py \
        --model_name_or_path examples/speech-recognition/small_ctc --num_stages 2 \
        --train_file out/demo_numbers/train.jsonl \
        --validation_file out/demo_numbers/validation.jsonl \
        --do_train --do_eval --max_duration_in_seconds 2 --output_dir out/ctc

Options are spelled as in transformers' own run_speech_recognition_ctc.py; ``--help`` lists them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import ctrl_c  # noqa: F401 - from here on
from demo_model import load_model, load_processor
from fine_tuning import prepare
from script_data import media_data, read_splits
from script_options import run_command_line
from trainer_run import TrainerJob, TrainerOptions, run_trainer
from transformers import Wav2Vec2Processor

from tasks.samples import Row
from tasks.speech import (
    SpeechOptions,
    collate_speech,
    ctc_tokenizer,
    require_frames,
    spoken_frames,
    text_scores,
    tokenizer_for,
)


@dataclass(kw_only=True)
class Options(TrainerOptions, SpeechOptions):
    """Everything that the script can be told."""


def run(options: Options) -> Any:
    """Train and evaluate a model that says what is spoken; the score is the word error rate."""
    prepare(options)
    rows = read_splits(options)
    name = options.model_name_or_path
    extractor = load_processor(name, "AutoFeatureExtractor")
    tokenizer = tokenizer_for(options, rows, partial(ctc_tokenizer, folder=options.folder))
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = load_model(name, "AutoModelForCTC", **sizes)

    def features(row: Row, folder: Path) -> dict[str, Any]:
        labels = tokenizer(options.text(row))["input_ids"]
        sound = options.sound(row, folder, extractor)
        require_frames(model, sound, labels)
        return {**sound, "labels": labels}

    if extractor.return_attention_mask:
        options.label_names = ["labels", "attention_mask"]
    job = TrainerJob(
        model,
        Wav2Vec2Processor(extractor, tokenizer),
        media_data(options, rows, features),
        collate_speech,
        text_scores(tokenizer, {}, {"group_tokens": False}),
        partial(spoken_frames, model),
        "wer",
    )
    return run_trainer(options, job)


if __name__ == "__main__":
    run_command_line(run, Options)
