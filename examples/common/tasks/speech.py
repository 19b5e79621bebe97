"""Speech and its text: features of both, batches of them, and how many words are wrong.

Axes: ``B`` samples, ``L`` frames or tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_model import load_processor
from model_loading import has_no_weights
from script_data import name_of
from torch import Tensor
from transformers import Wav2Vec2CTCTokenizer, WhisperTokenizer, default_data_collator

from ipu_pipeline.capture.example_batch import IGNORED_LABEL
from ipu_pipeline.errors import DatasetError
from ipu_pipeline.ir.files import write_text
from ipu_pipeline.train.arguments import option
from tasks.media import read_sound
from tasks.samples import Row, Rows, in_data, require

Options = Mapping[str, Any]
Scores = dict[str, float]
# What Whisper's decoder is told before the text.
_WHISPER = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|translate|>",
            "<|notimestamps|>")  # fmt: skip
_LABELS = 32  # lengths of labels are multiples of it


@dataclass(kw_only=True)
class SoundOptions:
    """Where the sounds are, and how long they may be."""

    audio_column_name: str = option(default="audio", help="Column of the sound.")
    max_duration_in_seconds: float = option(
        default=20.0, help="Sounds are padded to this (one shape for all batches)."
    )

    def sound(self, row: Row, folder: Path, extractor: Any, *, cut: bool = False) -> dict[str, Any]:
        """Return the features of a row's sound, padded.

        Args:
            row: The sample.
            folder: That of its file.
            extractor: A feature extractor of transformers.
            cut: Cut longer sounds.

        Raises:
            DatasetError: The sound cannot be read, or is too long.
        """
        rate = extractor.sampling_rate
        value = require(row, self.audio_column_name, object, "it")
        sound_T, most = read_sound(value, folder, rate), int(self.max_duration_in_seconds * rate)
        length = getattr(extractor, "n_samples", most)  # Whisper's, which takes one length only
        if len(sound_T) > min(most, length) and not cut:
            raise DatasetError(
                f"it lasts {len(sound_T) / rate:.2f} s, more than the "
                f"{min(most, length) / rate:.2f} s of --max_duration_in_seconds and of the model; "
                "leave it out, or raise that"
            )
        made = extractor(
            sound_T,
            sampling_rate=rate,
            max_length=length,
            truncation=True,
            padding="max_length",
            return_tensors="pt",
        )
        return {name: tensor[0] for name, tensor in made.items()}


@dataclass(kw_only=True)
class SpeechOptions(SoundOptions):
    """Where the speech and its text are."""

    text_column_name: str = option(default="text", help="Column of the text.")

    def text(self, row: Row) -> str:
        """Return what is said in a row."""
        text: str = require(row, self.text_column_name, str, "it")
        return text


def tokenizer_for(
    options: Any, rows: Mapping[str, Rows], make: Callable[[Sequence[str]], Any]
) -> Any:
    """Return the tokenizer of the model; of one without weights, what is made of all characters.

    Args:
        options: The command line.
        rows: The samples of every split.
        make: Makes it of the characters of their texts, in order.
    """
    name = options.model_name_or_path
    if not has_no_weights(Path(name)):
        return load_processor(name, "AutoTokenizer")
    known: set[str] = set()
    for split, samples in rows.items():
        for i, row in enumerate(samples):
            with in_data(f"{name_of(split, options)}, row {i}"):
                known.update(options.text(row))
    return make(sorted(known))


def require_frames(model: Any, sound: Mapping[str, Any], labels: Sequence[int]) -> None:
    """Refuse a sound of which CTC has too few frames for its text: that loss is infinite.

    Raises:
        DatasetError: It has.
    """
    mask = sound.get("attention_mask")
    size = len(sound["input_values"]) if mask is None else int(mask.sum())
    frames = int(model._get_feat_extract_output_lengths(torch.tensor(size)))
    needed = len(labels) + sum(one == other for one, other in pairwise(labels))
    if frames < 1 or (frames < needed and not model.config.ctc_zero_infinity):
        raise DatasetError(
            f"the model hears {max(frames, 0)} frames in its sound, its text needs at least "
            f"{max(needed, 1)}; leave it out"
        )


def ctc_tokenizer(known: Sequence[str], folder: Path) -> Any:
    """Return a tokenizer of single characters for CTC; its padding is the blank."""
    words = [letter for letter in known if letter != " "]
    vocabulary = {letter: i for i, letter in enumerate([*words, "|", "[UNK]", "[PAD]"])}
    write_text(folder / "vocab.json", json.dumps(vocabulary))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": None, "eos_token": None}
    return Wav2Vec2CTCTokenizer(folder / "vocab.json", **special)


def whisper_tokenizer(known: Sequence[str]) -> Any:
    """Return a tokenizer of single characters for Whisper."""
    words = ["Ġ" if letter == " " else letter for letter in known]
    names = [*words, "<|endoftext|>", *_WHISPER]
    return WhisperTokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        pad_token="<|endoftext|>",
        extra_special_tokens=[*_WHISPER],
    )


def collate_speech(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return a batch: labels are padded with -100, to few different lengths."""
    longest = max(len(sample["labels"]) for sample in samples)
    length = -(-longest // _LABELS) * _LABELS
    padded = [
        {
            **sample,
            "labels": [*sample["labels"], *[IGNORED_LABEL] * (length - len(sample["labels"]))],
        }
        for sample in samples
    ]
    batch: dict[str, Tensor] = default_data_collator(padded)
    return batch


def spoken_frames(model: Any, logits_BLV: Tensor, labels: Any) -> Tensor:
    """Return the best token of every frame: [B, L]; the blank where a sound is padded.

    ``labels`` are those and the mask of the sounds, or labels alone.
    """
    best_BL = logits_BLV.argmax(-1)
    if isinstance(labels, tuple):
        lengths_B = model._get_feat_extract_output_lengths(labels[1].sum(-1))
        padded_BL = torch.arange(best_BL.shape[1]) >= lengths_B[:, None]
        best_BL = best_BL.masked_fill(padded_BL, model.config.pad_token_id)
    return best_BL


def text_scores(tokenizer: Any, found: Options, expected: Options) -> Callable[[Any], Scores]:
    """Return what scores predicted tokens beside labels.

    Args:
        tokenizer: Turns both into text.
        found: What it is told about the predictions.
        expected: The same about the labels.
    """

    def scores(both: Any) -> Scores:
        ids = both.label_ids
        predicted, labels = (
            np.where(tokens == IGNORED_LABEL, tokenizer.pad_token_id, tokens)
            for tokens in (both.predictions, ids[0] if isinstance(ids, tuple) else ids)
        )
        return error_rates(
            tokenizer.batch_decode(predicted, **found), tokenizer.batch_decode(labels, **expected)
        )

    return scores


def error_rates(found: Sequence[str], expected: Sequence[str]) -> Scores:
    """Return the errors by word (``wer``) and by character (``cer``), as shares of what was said.

    An error is a word or a character that has to be put in, left out or replaced.
    """
    pairs = [*zip(found, expected, strict=True)]
    kinds = {"wer": [(a.split(), b.split()) for a, b in pairs], "cer": pairs}
    return {
        name: sum(edits(a, b) for a, b in both) / max(1, sum(len(b) for _, b in both))
        for name, both in kinds.items()
    }


def edits(found: Sequence[Any], expected: Sequence[Any]) -> int:
    """Return the fewest insertions, deletions and replacements between two sequences."""
    row = list(range(len(expected) + 1))
    for i, one in enumerate(found, start=1):
        before, row = row, [i]
        for j, other in enumerate(expected):
            row.append(min(before[j + 1] + 1, row[j] + 1, before[j] + (one != other)))
    return row[-1]
