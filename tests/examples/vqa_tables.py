"""Tiny data sets of region features, and a tiny LXMERT, for the tests of run_vqa.py."""

import json
from pathlib import Path

import numpy as np

REGIONS, WIDTH = 3, 5
COLOURS = ("red", "green", "blue")
LXMERT = {
    "model_type": "lxmert",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "l_layers": 1,
    "r_layers": 1,
    "x_layers": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
}


def label(number: int, form: str) -> object:
    """Return answer ``number`` as a label of some form."""
    if form == "soft":
        return {"ids": [number, (number + 1) % 3], "weights": [1.0, 0.3]}
    return COLOURS[number] if form == "text" else number


def records(count: int, form: str = "hard", seed: int = 0) -> list[dict[str, object]]:
    """Return rows whose answer is the largest of the first three features, by far."""
    generator = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    for number in range(count):
        answer = int(generator.integers(3))
        features = generator.random((REGIONS, WIDTH), dtype=np.float32)
        features[:, answer] += 2
        rows.append(
            {
                "question_id": number,
                "question": ("what colour is it?", "which colour has the box?")[number % 2],
                "visual_feats": features.tolist(),
                "visual_pos": generator.random((REGIONS, 4)).tolist(),
                "label": label(answer, form),
            }
        )
    return rows


def write_json(folder: Path, form: str = "hard") -> tuple[Path, Path]:
    """Write a file of 16 rows to train on and one of 6 rows to evaluate on."""
    paths = folder / "train.json", folder / "validation.json"
    for seed, (path, count) in enumerate(zip(paths, (16, 6), strict=True)):
        path.write_text(json.dumps(records(count, form, seed)), encoding="utf-8")
    return paths


def write_config(folder: Path, **changes: object) -> Path:
    """Write the config.json of a tiny LXMERT without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LXMERT | changes), encoding="utf-8")
    return folder
