"""Data, tiny models and flags for transformers' published scripts, and a run of one of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from PIL import Image

from tests.examples.tasks.tiny import PIECES, make_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = [f"w{i}" for i in range(12)]
BERT = {
    "vocab_size": len(PIECES), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
GPT2 = {
    "vocab_size": len(PIECES), "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
BART = {
    "vocab_size": len(PIECES), "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2, "forced_eos_token_id": 3,
}  # fmt: skip
T5 = {
    "vocab_size": len(PIECES), "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8,
    "d_ff": 64, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 3,
    "decoder_start_token_id": 0,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 16, "patch_size": 8, "hidden_dropout_prob": 0.0,
}  # fmt: skip
QUIET = (
    "--use_cpu --report_to none --disable_tqdm true --seed 7 --do_train --do_eval --max_steps 4 "
    "--learning_rate 3e-3 --logging_steps 1 --save_strategy no --per_device_train_batch_size 4 "
    "--per_device_eval_batch_size 4 --gradient_accumulation_steps 2 --dataloader_pin_memory false"
)
_TEXTS = "--train_file {data}/train.{kind} --validation_file {data}/validation.{kind} "
_SEQUENCES = _TEXTS + "--predict_with_generate --num_beams 2 --max_source_length 32 "
_SEQUENCES += "--max_target_length 16 --val_max_target_length 12 "


def _texts(rng: Random, length: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=length))


def _question(rng: Random) -> dict[str, Any]:
    context, at = _texts(rng), rng.randrange(12)
    answer = context.split()[at]
    start = len(" ".join(context.split()[:at])) + (at > 0)
    answers = {"text": [answer], "answer_start": [start]}
    return {"id": str(rng.random()), "question": answer, "context": context, "answers": answers}


def _pair(rng: Random) -> dict[str, Any]:
    label = rng.choice(("good", "bad"))
    return {"sentence1": f"{_texts(rng, 5)} {label}", "sentence2": _texts(rng, 3), "label": label}


def _summary(rng: Random) -> dict[str, Any]:
    text = _texts(rng)
    return {"text": text, "summary": " ".join(text.split()[:3])}


def _translation(rng: Random) -> dict[str, Any]:
    text = _texts(rng, 6)
    return {"translation": {"en": text, "de": " ".join(reversed(text.split()))}}


def _write_rows(make: Callable[[Random], Any], field: str = "") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for split, count in (("train", 30), ("validation", 10), ("test", 6)):
            rng = Random(split)
            rows = [make(rng) for _ in range(count)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            text = json.dumps({field: rows}) if field else lines
            (folder / f"{split}.json").write_text(text)

    return write


def _write_lines(folder: Path) -> None:
    for split, count in (("train", 120), ("validation", 40)):
        rng = Random(split)
        (folder / f"{split}.txt").write_text("".join(_texts(rng) + "\n" for _ in range(count)))


def _write_images(folder: Path) -> None:
    for split, count in (("train", 15), ("validation", 5)):
        for label, colour in (("cat", 60), ("dog", 180)):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", (20, 20), (colour, 10 * i, 255 - colour))
                picture.save(folder / split / label / f"{i}.png")


@dataclass(frozen=True)
class Trial:
    """A script, what it trains and what it is told.

    Attributes:
        script: Its path below ``examples/pytorch``.
        auto_class: Name of the auto class that it loads.
        config: Of a tiny model.
        write: Writes the data into a folder.
        flags: Of its own; ``{data}`` is that folder.
        imports: The file in which the import of the trainer is changed, where it is another one.
    """

    script: str
    auto_class: str
    config: transformers.PretrainedConfig
    write: Callable[[Path], None]
    flags: str
    imports: str = ""


_ROWS = {"data": "{data}", "kind": "json"}
TRIALS = {
    "qa": Trial(
        "question-answering/run_qa.py", "AutoModelForQuestionAnswering",
        transformers.BertConfig(**BERT), _write_rows(_question, "data"),
        _TEXTS.format(**_ROWS) + "--test_file {data}/test.json --do_predict --max_seq_length 32 "
        "--doc_stride 8", "trainer_qa.py",
    ),
    "glue": Trial(
        "text-classification/run_glue.py", "AutoModelForSequenceClassification",
        transformers.BertConfig(**BERT), _write_rows(_pair),
        _TEXTS.format(**_ROWS) + "--max_seq_length 32",
    ),
    "clm": Trial(
        "language-modeling/run_clm.py", "AutoModelForCausalLM", transformers.GPT2Config(**GPT2),
        _write_lines, _TEXTS.format(data="{data}", kind="txt") + "--block_size 32",
    ),
    "mlm": Trial(
        "language-modeling/run_mlm.py", "AutoModelForMaskedLM", transformers.BertConfig(**BERT),
        _write_lines, _TEXTS.format(data="{data}", kind="txt") + "--max_seq_length 32",
    ),
    "summarization": Trial(
        "summarization/run_summarization.py", "AutoModelForSeq2SeqLM",
        transformers.BartConfig(**BART), _write_rows(_summary),
        _SEQUENCES.format(**_ROWS) + "--test_file {data}/test.json --do_predict",
    ),
    "translation": Trial(
        "translation/run_translation.py", "AutoModelForSeq2SeqLM", transformers.T5Config(**T5),
        _write_rows(_translation),
        _SEQUENCES.format(**_ROWS) + "--source_lang en --target_lang de --test_file "
        "{data}/test.json --do_predict",
    ),
    "image": Trial(
        "image-classification/run_image_classification.py", "AutoModelForImageClassification",
        transformers.ViTConfig(**VIT), _write_images,
        "--train_dir {data}/train --validation_dir {data}/validation "
        "--remove_unused_columns false",
    ),
}  # fmt: skip


def prepare(trial: Trial, folder: Path) -> None:
    """Write the data and the tiny model of a trial."""
    (folder / "data").mkdir()
    trial.write(folder / "data")
    torch.manual_seed(0)
    model = getattr(transformers, trial.auto_class).from_config(trial.config)
    model.save_pretrained(folder / "model")
    if trial.config.model_type == "vit":
        size = {"height": 16, "width": 16}
        transformers.ViTImageProcessor(size=size).save_pretrained(folder / "model")
    else:
        special = {"bos_token": "[CLS]", "eos_token": "[SEP]"}
        make_tokenizer(**special).save_pretrained(folder / "model")


def changed(source: str, module: str, prefix: str) -> str:
    """Return a script with its import of the trainer changed, and nothing else.

    Args:
        source: Its text.
        module: What the trainer is imported from.
        prefix: What its name begins with there.
    """
    imports = r"(?m)^ +{0},\n|(?<=^from transformers import ){0}, |^from trainer_qa import {0}\n"
    names = ("QuestionAnsweringTrainer", "Seq2SeqTrainer", "Trainer")
    name = next(n for n in names if re.search(imports.format(n), source))
    left, count = re.subn(imports.format(name), "", source)
    assert count == 1, f"{count} imports of {name}"
    return f"from {module} import {prefix}{name} as {name}\n{left}"


def run(trial: Trial, scripts: Path, folder: Path, change: tuple[str, str] | None) -> Any:
    """Run a script on what ``prepare`` has written, and return what it wrote.

    Args:
        trial: The script.
        scripts: ``examples/pytorch`` of transformers.
        folder: Where its data and model are.
        change: What the trainer is imported from in place of transformers, and its prefix there.
    """
    out = folder / ("ours" if change else "theirs") / (change[1] if change else "")
    work = out / "script"
    shutil.copytree((scripts / trial.script).parent, work)
    script = work / Path(trial.script).name
    if change is not None:
        file = work / (trial.imports or script.name)
        file.write_text(changed(file.read_text(encoding="utf-8"), *change), encoding="utf-8")
    flags = f"{QUIET} {trial.flags.format(data=folder / 'data')}"
    flags += f" --model_name_or_path {folder / 'model'} --output_dir {out / 'run'}"
    path = os.pathsep.join(map(str, (Path(__file__).with_name("stand_ins"), ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, script, *flags.split()],
        capture_output=True, text=True, env=environment, cwd=work,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    results = json.loads((out / "run" / "all_results.json").read_text())
    history = json.loads((out / "run" / "trainer_state.json").read_text())["log_history"]
    return results, history
