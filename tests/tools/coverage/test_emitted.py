"""What is planned for IPUs is emitted, whatever the class."""

from __future__ import annotations

import pytest

from ipu_pipeline.errors import LoweringError
from tests.tools.coverage.test_sample import SAMPLE
from tools.coverage import emitted
from tools.coverage.classes import ModelClass, model_classes
from tools.coverage.table import markdown


def _class(name: str) -> ModelClass:
    (item,) = [found for found in model_classes(name) if found.name == name]
    return item


@pytest.mark.acceptance
@pytest.mark.parametrize("name", SAMPLE)
def test_what_is_planned_is_emitted(name: str) -> None:
    found = emitted.check_emitted(_class(name))
    assert found.result in ("pass", "capture-refused"), found.reason


def test_random_numbers_of_the_forward_pass_are_drawn_for_every_microbatch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A masked autoencoder: the step is eager's with as many draws, in the same order."""
    monkeypatch.setattr(emitted, "STAGES", (2,))
    found = emitted.check_emitted(_class("ViTMAEForPreTraining"))
    assert (found.result, found.stages) == ("pass", (2,)), found.reason


def test_nothing_is_compared_with_what_no_seed_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emitted, "STAGES", (2,))
    found = emitted.check_emitted(_class("ReformerForMaskedLM"))
    assert (found.result, found.reason) == (
        "nondeterministic",
        "two steps with the same seed differ",
    )


def test_a_plan_that_emit_refuses_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    item = _class("SqueezeBertForQuestionAnswering")
    monkeypatch.setattr(emitted, "STAGES", (2,))
    found = emitted.check_emitted(item)
    assert (found.result, found.stages) == ("pass", (2,))

    def refuse(*_: object) -> None:
        raise LoweringError("not so")

    monkeypatch.setattr(emitted, "emit", refuse)
    found = emitted.check_emitted(item)
    assert (found.result, found.reason) == ("emit-refused", "2 stages: LoweringError: not so")
    page = markdown([found], {"torch": "2", "transformers": "5"}, "check_emitted")
    assert "every plan is written as a bundle" in page
    assert "SqueezeBertForQuestionAnswering | squeezebert | emit-refused | 2 stages: Low" in page
