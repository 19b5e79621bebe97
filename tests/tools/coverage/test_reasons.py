"""What the table says of classes that cannot be trained alone."""

from __future__ import annotations

import importlib.util
import types
from typing import Any

import pytest
import transformers
from torch import Tensor, nn

from tools.coverage.check import check_class
from tools.coverage.classes import ModelClass
from tools.coverage.reasons import Progress, why_not_built, why_not_trained


class Labelled(nn.Module):
    def forward(self, x: Tensor, labels: Tensor) -> Any: ...


class Unlabelled(nn.Module):
    def forward(self, x: Tensor, input_labels: Tensor, **kwargs: Any) -> Any: ...


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        (Labelled, ImportError("A requires the timm library but"), "needs the package timm, which"),
        (Labelled, NotImplementedError("Not yet"), "transformers does not train it: Not yet"),
        (Labelled, ValueError("X is not trainable"), "transformers does not train it: X is not"),
        (
            Labelled,
            IndexError("list\n index"),
            "no small config and batch of ours suits it: IndexError: list index",
        ),
        (Unlabelled, IndexError("list"), "transformers computes no loss for it: its forward takes"),
    ],
)
def test_reason(kind: type[nn.Module], error: Exception, reason: str) -> None:
    assert why_not_trained(kind, error).startswith(reason)


@pytest.mark.parametrize("installed", [True, False])
def test_losses_of_detection_need_a_package(
    *, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = types.SimpleNamespace() if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)
    error = IndexError("list index out of range")
    reason = why_not_trained(transformers.RTDetrForObjectDetection, error)
    package = "its loss needs the package scipy, which is not installed"
    ours = "no small config and batch of ours suits it: IndexError: list index out of range"
    assert reason == (ours if installed else package)
    assert why_not_trained(transformers.BertForMaskedLM, error) == ours


def test_a_class_that_its_own_defaults_do_not_build() -> None:
    error = AttributeError("no rope_theta")
    whose = why_not_built(transformers.DbrxForCausalLM, error)
    assert whose.startswith("transformers cannot build it from its own default config: Attribute")
    assert why_not_built(transformers.BertForMaskedLM, error).startswith("no small config and")
    other = why_not_built(transformers.DbrxForCausalLM, IndexError("list"))
    assert other.startswith("no small config and batch of ours suits it: IndexError: list")


def test_a_class_that_needs_a_package_by_default() -> None:
    class Needy(Labelled):
        config_class = dict

        def __init__(self, config: dict[str, Any]) -> None:
            raise ImportError("NeedyLoss requires the scipy library but it was not found")

    assert why_not_built(Needy, ValueError("groups")).startswith("needs the package scipy, which")


def test_progress_counts_module_calls_while_it_is_asked_to() -> None:
    progress, layer = Progress(), nn.Sequential(nn.Identity(), nn.Identity())
    with progress.counting():
        layer(1)
    layer(1)
    assert progress.calls == 3


@pytest.mark.parametrize(
    ("name", "architecture", "task", "reason"),
    [
        ("SamModel", "sam", "mask-generation", "transformers computes no loss for it: its forward"),
        ("VitsModel", "vits", "text-to-waveform", "transformers does not train it: Training of"),
    ],
)
def test_reasons_in_the_table(name: str, architecture: str, task: str, reason: str) -> None:
    record = check_class(ModelClass(name, architecture, task))
    assert record.result == "eager-fails"
    assert record.reason.startswith(reason)
