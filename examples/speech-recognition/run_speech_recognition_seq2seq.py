r"""Recognise speech with Whisper, split over pipeline stages; its text is generated.

    python examples/speech-recognition/run_speech_recognition_seq2seq.py \
        --model_name_or_path examples/speech-recognition/small_whisper --num_stages 2 \
        --train_file out/demo_numbers/train.jsonl \
        --validation_file out/demo_numbers/validation.jsonl --do_train --do_eval \
        --max_duration_in_seconds 2 --predict_with_generate --output_dir out/whisper

Options are spelled as in transformers' own run_speech_recognition_seq2seq.py; ``--help`` lists
them.
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
from model_loading import has_no_weights
from script_data import media_data, read_splits
from script_options import run_command_line
from trainer_run import Seq2SeqOptions, TrainerJob, run_trainer
from transformers import Seq2SeqTrainer, WhisperProcessor

from ipu_pipeline.train.arguments import option
from tasks.samples import Row
from tasks.speech import (
    SpeechOptions,
    collate_speech,
    text_scores,
    tokenizer_for,
    whisper_tokenizer,
)


@dataclass(kw_only=True)
class Options(Seq2SeqOptions, SpeechOptions):
    """Everything that the script can be told."""

    language: str | None = option(default=None, help="Of the speech, for a multilingual model.")
    task: str | None = option(default=None, help="transcribe or translate, for such a model.")


def run(options: Options) -> Any:
    """Train and evaluate a model that says what is spoken; the score is the word error rate."""
    prepare(options)
    rows = read_splits(options)
    name = options.model_name_or_path
    extractor = load_processor(name, "AutoFeatureExtractor")
    tokenizer, tokens = tokenizer_for(options, rows, whisper_tokenizer), {}
    if has_no_weights(Path(name)):
        end = tokenizer.eos_token_id
        tokens = {"vocab_size": len(tokenizer), "pad_token_id": end, "bos_token_id": end,
                  "eos_token_id": end, "decoder_start_token_id":
                  tokenizer.convert_tokens_to_ids("<|startoftranscript|>")}  # fmt: skip
    model = load_model(name, "AutoModelForSpeechSeq2Seq", **tokens)
    if options.language or options.task:
        tokenizer.set_prefix_tokens(language=options.language, task=options.task)
        model.generation_config.update(language=options.language, task=options.task)

    def features(row: Row, folder: Path) -> dict[str, Any]:
        labels = tokenizer(options.text(row))["input_ids"]
        begins = labels[0] == model.config.decoder_start_token_id  # which the model puts before
        return {**options.sound(row, folder, extractor), "labels": labels[begins:]}

    plain = {"skip_special_tokens": True}
    job = TrainerJob(
        model,
        WhisperProcessor(extractor, tokenizer),
        media_data(options, rows, features),
        collate_speech,
        text_scores(tokenizer, plain, plain) if options.predict_with_generate else None,
        main_metric="wer" if options.predict_with_generate else "loss",
        trainer=Seq2SeqTrainer,
    )
    return run_trainer(options, job)


if __name__ == "__main__":
    run_command_line(run, Options)
