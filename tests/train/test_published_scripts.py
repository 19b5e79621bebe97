"""transformers' published example scripts give the same numbers after one changed import.

They are not in its package: ``IPU_PIPELINE_TRANSFORMERS_EXAMPLES`` names ``examples/pytorch`` of a
checkout of transformers 5.x.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.train.published import TRIALS, Trial, prepare, run

VARIABLE = "IPU_PIPELINE_TRANSFORMERS_EXAMPLES"
IMPORT_ONLY = ("ipu_pipeline.train", "Pipeline")
TWO_STAGES = ("tests.train.helpers", "TwoStages")
TIMES = ("runtime", "per_second", "total_flos")


@pytest.fixture
def scripts() -> Path:
    if VARIABLE not in os.environ:
        pytest.skip(f"{VARIABLE} does not name examples/pytorch of transformers 5.x")
    return Path(os.environ[VARIABLE])


@pytest.mark.acceptance
@pytest.mark.timeout(1800)  # three processes, each of which imports everything
@pytest.mark.parametrize("name", TRIALS)
def test_one_changed_import_gives_the_same_numbers(scripts, tmp_path, name) -> None:
    if name == "image" and find_spec("torchvision") is None:
        pytest.skip("run_image_classification.py needs torchvision")
    prepare(TRIALS[name], tmp_path)
    expected, history = run(TRIALS[name], scripts, tmp_path, None)
    assert "train_loss" in expected
    assert {"eval_loss", "eval_score"} & expected.keys()
    for trial, change in _changes(name):
        found, ours = run(trial, scripts, tmp_path, change)
        assert _numbers(found) == pytest.approx(_numbers(expected), rel=1e-4)
        assert len(ours) == len(history) >= 5
        for mine, theirs in zip(ours, history, strict=True):
            assert _numbers(mine) == pytest.approx(_numbers(theirs), rel=1e-4)


def _changes(name: str) -> list[tuple[Trial, tuple[str, str]]]:
    """Return what is changed in which file."""
    changes = [(TRIALS[name], TWO_STAGES), (TRIALS[name], IMPORT_ONLY)]
    if name == "qa":  # the trainer itself is theirs
        changes.append((replace(TRIALS[name], imports=""), ("mixed_trainer_qa", "Mixed")))
    return changes


def _numbers(entry: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in entry.items() if not any(time in k for time in TIMES)}
