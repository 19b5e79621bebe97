"""Scripts for pictures and sounds: over stages as in one piece, and so are their pipelines."""

from __future__ import annotations

import json
import shutil
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import EvalPrediction

import ipu_pipeline as ipp
from ipu_pipeline.errors import DatasetError
from tests.later import every_second

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Script:
    """A script, its data and model, and the task of transformers that its model is for."""

    path: str
    data: str
    model: str
    options: dict[str, Any]
    task: str | None = None


_CTC = Script("speech-recognition/run_speech_recognition_ctc.py", "numbers", "small_ctc",
              {"max_duration_in_seconds": 1.4}, "automatic-speech-recognition")  # fmt: skip
SCRIPTS = {
    "images": Script("image-classification/run_image_classification.py", "shapes", "small", {},
                     "image-classification"),
    "sounds": Script("audio-classification/run_audio_classification.py", "words", "small",
                     {"max_duration_in_seconds": 0.7}, "audio-classification"),
    "ctc": _CTC,
    "whisper": Script("speech-recognition/run_speech_recognition_seq2seq.py", "numbers",
                      "small_whisper", {"max_duration_in_seconds": 1.4, "generation_max_length": 6,
                                        "predict_with_generate": True},
                      "automatic-speech-recognition"),
    "pretraining": Script("speech-pretraining/run_wav2vec2_pretraining.py", "numbers", "small",
                          {"max_duration_in_seconds": 1.4}),
}  # fmt: skip


@pytest.fixture
def run(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a script on a little data, and returns its trainer."""

    def run(script: Script, **changes: Any) -> Any:
        data, path = tmp_path / "data", EXAMPLES / script.path
        monkeypatch.syspath_prepend(str(path.parent))
        module = example(path.stem)
        if not data.exists():
            example("make_media_data").main(script.data, data, 1, 4, 1)
        given = {
            "model_name_or_path": str(_smaller(path.parent / script.model, tmp_path)),
            "output_dir": tmp_path / f"out{len(list(tmp_path.iterdir()))}",
            "train_file": data / "train.jsonl",
            "validation_file": data / "train.jsonl",  # where all classes are known
            "max_eval_samples": 2,
            "do_train": True,
            "do_eval": True,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        return module.run(module.Options(**{**given, **script.options, **changes}))

    return run


def _smaller(folder: Path, into: Path) -> Path:
    """Return a folder of the same model with 2 layers."""
    made = into / folder.name
    shutil.copytree(folder, made, dirs_exist_ok=True)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    return made


def _noiseless(logits: Tensor, tau: float, hard: bool) -> Tensor:
    soft = (logits / tau).softmax(-1)
    return torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]) - soft.detach() + soft


@pytest.mark.parametrize("name", every_second(SCRIPTS))
def test_learns_and_serves_as_in_one_piece(
    name: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its noise is drawn otherwise over stages, as that of dropout is.
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", _noiseless)
    script = SCRIPTS[name]
    theirs, ours = run(script, unsplit=True), run(script, num_stages=2)
    assert ours.plan.num_stages == 2
    assert json.loads((ours.args.folder / "plan.json").read_text())
    logs = [
        {
            (row["step"], key): value
            for row in trainer.state.log_history
            for key, value in row.items()
            if not any(word in key for word in ("runtime", "per_second", "flos"))
        }
        for trainer in (theirs, ours)
    ]
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    if script.task is not None:
        _serves_alike(script.task, ours, tmp_path / "data" / "train")


def _serves_alike(task: str, trainer: Any, folder: Path) -> None:
    """Compare transformers' pipeline with ours, over the plan that the model was trained with."""
    path = next(folder.iterdir())
    alone = transformers.pipeline(task, str(trainer.args.folder))
    parts = {
        part: getattr(alone, part)
        for part in ("tokenizer", "feature_extractor", "image_processor")
        if getattr(alone, part, None) is not None
    }
    found = ipp.pipeline(task, alone.model, trainer.plan, **parts)
    value: Any = str(path)
    if path.suffix == ".wav":
        with wave.open(value, "rb") as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        value = {"raw": samples / np.float32(32768), "sampling_rate": 16000}
    few: dict[str, Any] = {}
    if hasattr(trainer.args, "generation_max_length"):
        few = {"generate_kwargs": {"max_new_tokens": 5}}
    assert found(dict(value) if isinstance(value, dict) else value, **few) == alone(value, **few)


def test_errors_are_counted_by_word_and_by_character(example: Any) -> None:
    example("trainer_run")
    from tasks.speech import edits, error_rates

    assert edits("kitten", "sitting") == 3
    assert edits([], ["a", "b"]) == 2
    found = error_rates(["one two", "six", ""], ["one too", "six", "nine"])
    assert found == pytest.approx({"wer": 2 / 4, "cer": (1 + 4) / (7 + 3 + 4)})


def test_letters_that_a_blank_divides_are_two(example: Any, tmp_path: Path) -> None:
    example("trainer_run")
    from tasks.speech import ctc_tokenizer, text_scores

    tokenizer = ctc_tokenizer([*" ehrt"], tmp_path)
    labels = np.array([[*tokenizer("three tee")["input_ids"], -100]])
    blank = tokenizer.pad_token_id
    frames = np.insert(np.repeat(labels, 2, axis=1), [8, 16], blank, axis=1)
    scores = text_scores(tokenizer, {}, {"group_tokens": False})
    assert scores(EvalPrediction(frames, labels)) == {"wer": 0, "cer": 0}


def test_what_is_wrong_with_a_sound_is_said(run: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"train.jsonl, row \d, it lasts .* s, more than"):
        run(_CTC, max_duration_in_seconds=0.1, unsplit=True)
    (tmp_path / "data" / "train" / "00000.wav").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"row 0, sound train/00000.wav cannot be read \("):
        run(_CTC, max_train_samples=1, max_steps=1, unsplit=True)
    with wave.open(str(tmp_path / "data" / "train" / "00000.wav"), "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(800))
    with pytest.raises(DatasetError, match="has 8000 samples per second of 16 bits, the model"):
        run(_CTC, max_train_samples=1, max_steps=1, unsplit=True)


def test_what_is_wrong_with_a_text_is_said(run: Any, tmp_path: Path) -> None:
    run(_CTC, do_train=False, unsplit=True)  # makes the data
    given = tmp_path / "data" / "long.jsonl"

    def refused(message: str, **row: Any) -> None:
        given.write_text(json.dumps({"audio": "train/00000.wav", **row}) + "\n")
        with pytest.raises(DatasetError, match=message):
            run(_CTC, train_file=given, do_eval=False, unsplit=True)

    refused(r"long.jsonl, row 0, it has no column 'text'")
    refused(r"row 0, the model hears \d+ frames in its sound, its text needs at least 500; leave",
            text="no" * 250)  # fmt: skip
    with wave.open(str(tmp_path / "data" / "train" / "00000.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(6))
    refused("row 0, the model hears 0 frames in its sound, its text needs at least 1", text="")


def test_a_class_that_no_sample_trains_is_said_before_training(run: Any, tmp_path: Path) -> None:
    script = SCRIPTS["images"]
    with pytest.raises(DatasetError, match="evaluate a model that was trained on these classes"):
        run(script, do_train=False, unsplit=True)  # makes the data
    given, folder = tmp_path / "data" / "other.jsonl", tmp_path / "untrained"
    rows = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    given.write_text("\n".join([rows[0], json.dumps({**json.loads(rows[1]), "label": "moon"})]))
    with pytest.raises(DatasetError, match=r"other.jsonl, row 1 has label 'moon', the classes"):
        run(script, validation_file=given, output_dir=folder, unsplit=True)
    assert not (folder / "train_results.json").exists()


def test_one_piece_takes_no_plan(run: Any) -> None:
    with pytest.raises(ValueError, match="in this process; leave out --num_stages"):
        run(_CTC, unsplit=True, num_stages=2)
