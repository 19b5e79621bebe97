"""Hand layouts against ours: the configs fit the layouts, and ours is never slower."""

from __future__ import annotations

import json
import re

import pytest
from transformers import AutoConfig

from benchmarks.gpu_accuracy import SHARED
from benchmarks.hand_layouts import HAND, RECIPES, compared, config_of, pairs, same_sign, text
from ipu_pipeline.backends.cluster.layouts.megatron_layout import parse_layout
from tests.benchmarks.test_gpu_accuracy import ROW

needs_rows = pytest.mark.skipif(not HAND.exists(), reason=f"{HAND} is not here")


@needs_rows
def test_every_layout_has_the_layers_of_its_config() -> None:
    for one in json.loads(HAND.read_text())["rows"]:
        config = config_of(one["model"])
        kind = config.pop("model_type")
        layers = AutoConfig.for_model(kind, **config).num_hidden_layers
        whole = re.sub(r"\|tttt\|\.\.\.17 x tttt\.\.\.\|", "|(t*4|)*17,", one["layout"])
        assert parse_layout(whole).num_layers == layers, one
        assert one["model"] in RECIPES


@pytest.mark.parametrize(
    ("published", "predicted", "right"),
    [(-0.3, -0.1, True), (-0.3, 0.1, False), (0.004, -0.01, True), (0.004, 0.1, False)],
)
def test_signs(published: float, predicted: float, *, right: bool) -> None:
    assert same_sign(published, predicted) is right


def test_runs_that_differ_in_their_split_are_a_pair() -> None:
    sizes = {"tokens_per_s_per_gpu": None, "vocab": 262144, "step_seconds": 2.0}
    even = {**ROW, "id": "a", "split": "even layers", **sizes}
    moved = {**even, "id": "b", "split": "layers moved by estimated compute", "step_seconds": 1.0}
    other = {**even, "id": "c", "seq": 4096}
    (found,) = pairs([even, moved, other])
    assert (found["first"], found["second"], found["even"], found["right"]) == (
        "a",
        "b",
        True,
        True,
    )
    assert "even against redistributed: 1 of 1 signs are right" in text([], [found])
    (unjudged, _) = pairs([{**even, "quality": "C"}, {**moved, "quality": "C"}])
    assert "not judged: a: batch, sequence or schedule" in text([], [unjudged])


@needs_rows
@pytest.mark.parametrize(
    "number",
    [1, *(pytest.param(n, marks=pytest.mark.acceptance) for n in range(15) if n != 1)],
)
def test_ours_is_at_least_as_fast_as_the_engineers(number: int) -> None:
    one = compared(json.loads(HAND.read_text())["rows"][number])
    assert one["ours_s"] <= one["hand_s"]
    assert one["ours_gb"] <= 1.002 * one["hand_gb"]
    assert 0 < one["bound_s"] <= one["ours_s"]
    assert one["gap"] <= 0.32  # docs/limits.md: bounds of interleaved schedules
    assert one["planned_s"] <= 20.0  # of one core
    assert one["hand"] in text([one], [])


@pytest.mark.acceptance
@needs_rows
def test_the_sign_of_every_redistribution_is_right() -> None:
    raw = json.loads(SHARED.read_text())
    found = [one for one in pairs(raw["rows"] if isinstance(raw, dict) else raw) if "even" in one]
    wrong = [one for one in found if one["even"] and not one["right"]]
    assert len(found) > 60
    assert not wrong
