"""Which classes there are, and samples of them."""

from __future__ import annotations

import pytest

from ipu_pipeline.errors import CaptureError
from tools.coverage.classes import model_classes, sample


def test_every_task_and_hundreds_of_architectures() -> None:
    classes = model_classes()
    assert len(classes) == len({item.name for item in classes}) > 850
    assert len({item.architecture for item in classes}) > 350
    tasks = {item.task for item in classes}
    assert {"causal-lm", "ctc", "depth-estimation", "object-detection", "pretraining"} <= tasks


@pytest.mark.parametrize(
    ("name", "architecture", "task"),
    [
        ("BertForQuestionAnswering", "bert", "question-answering"),
        ("GPT2LMHeadModel", "gpt2", "causal-lm"),
        ("LlamaForCausalLM", "llama", "causal-lm"),
        ("Wav2Vec2ForCTC", "wav2vec2", "ctc"),
    ],
)
def test_architecture_and_task_of_a_class(name: str, architecture: str, task: str) -> None:
    (item,) = model_classes(name)
    assert (item.architecture, item.task) == (architecture, task)
    assert item.load().__name__ == name


def test_patterns_choose_by_name_architecture_or_task() -> None:
    assert {item.architecture for item in model_classes("distilbert")} == {"distilbert"}
    assert {item.task for item in model_classes("ctc")} == {"ctc"}
    assert all("Bart" in item.name for item in model_classes("Bart*"))


def test_an_unknown_pattern_is_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"none of \d+ model classes .* like 'Bertt\*'; patterns"
    ):
        model_classes("Bertt*")


def test_a_sample_is_spread_over_the_tasks() -> None:
    classes = model_classes()
    chosen = sample(classes, 40)
    assert len(chosen) == 40
    assert len({item.task for item in chosen}) > 10
    assert sample(classes[:5], 40) == sorted(classes[:5], key=lambda item: (item.task, item.name))
