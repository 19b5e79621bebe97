"""Which model classes there are: what transformers' auto classes find for every task."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from ipu_pipeline.errors import CaptureError

_PREFIX, _SUFFIX = "MODEL_FOR_", "_MAPPING_NAMES"
# Models without a task of their own: backbones and encoders are parts of other classes.
_WITHOUT_TASK = ("BACKBONE", "IMAGE", "TEXT_ENCODING")
# A class under several tasks is listed under the one that says most about its labels.
_VAGUE = ("MULTIMODAL_LM", "PRETRAINING", "RETRIEVAL")


@dataclass(frozen=True)
class ModelClass:
    """One model class.

    Attributes:
        name: Of the class in ``transformers``.
        architecture: ``model_type`` of its config.
        task: Lower-case name of the auto mapping, such as ``causal-lm``.
    """

    name: str
    architecture: str
    task: str

    def load(self) -> Any:
        """Import the class."""
        return getattr(transformers, self.name)


def model_classes(pattern: str = "*") -> list[ModelClass]:
    """Return every class whose name, architecture or task matches ``pattern``, sorted by name.

    Raises:
        CaptureError: None does.
    """
    found = [
        ModelClass(name, architecture, task)
        for name, (architecture, task) in sorted(_all_classes().items())
    ]
    chosen = [
        item
        for item in found
        if any(fnmatch.fnmatch(text, pattern) for text in (item.name, item.architecture, item.task))
    ]
    if not chosen:
        raise CaptureError(
            f"none of {len(found)} model classes has a name, architecture or task like "
            f"{pattern!r}; patterns are like Bert*, *ForCausalLM or question-answering"
        )
    return chosen


def sample(classes: list[ModelClass], count: int) -> list[ModelClass]:
    """Return ``count`` classes spread evenly over tasks, and within a task over the names."""
    by_task = sorted(classes, key=lambda item: (item.task, item.name))
    if count >= len(by_task):
        return by_task
    return [by_task[index * len(by_task) // count] for index in range(count)]


def _all_classes() -> dict[str, tuple[str, str]]:
    """Architecture and task by class name."""
    found: dict[str, tuple[str, str]] = {}
    likeness: dict[str, int] = {}
    for task in sorted(_tasks(), key=lambda name: (name in _VAGUE, name)):
        mapping = getattr(modeling_auto, f"{_PREFIX}{task}{_SUFFIX}")
        for architecture, names in mapping.items():
            for name in names if isinstance(names, tuple) else (names,):
                alike = _common_letters(name, architecture)
                if name not in found or alike > likeness[name]:
                    known = found.get(name, ("", task.lower().replace("_", "-")))[1]
                    found[name], likeness[name] = (architecture, known), alike
    return found


def _common_letters(name: str, architecture: str) -> int:
    """Return the letters at the start that a class shares with an architecture that uses it."""
    plain = architecture.replace("-", "").replace("_", "")
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(name.lower(), plain, strict=False))
    return sum(1 for _ in alike) - len(plain)


def _tasks() -> list[str]:
    names = [name for name in dir(modeling_auto) if name.startswith(_PREFIX)]
    tasks = [name[len(_PREFIX) : -len(_SUFFIX)] for name in names if name.endswith(_SUFFIX)]
    return [task for task in tasks if task not in _WITHOUT_TASK]
