"""Why a model does not train alone, in one line that is true and says what is missing."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.loss.loss_utils import LOSS_MAPPING

from tools.coverage.record import one_line

_PACKAGE = re.compile(r"requires the (?:the )?(\w+) library")
_UNTRAINABLE = re.compile(
    r"not trainable|not support training|[Tt]raining .*not .*(support|implement)"
)
_LABELS = re.compile(
    r"(?!input_).*labels?|.*loss|.*targets?|target_values|future_values|start_positions|bool_masked_pos|actions|"
    r"ans|.*negative_indices|marks"
)


def why_not_trained(kind: type[nn.Module], error: BaseException) -> str:
    """Return the reason why a class cannot be trained alone.

    Args:
        kind: The class.
        error: What building it, or its step on the most promising batch, ended with.
    """
    text = " ".join(str(error).split())
    package = _PACKAGE.search(text)
    if package:
        return f"needs the package {package[1]}, which is not installed"
    if is_final(error):
        return f"transformers does not train it: {text}"
    if not any(map(_LABELS.fullmatch, inspect.signature(kind.forward).parameters)):
        return "transformers computes no loss for it: its forward takes no labels"
    package_of_loss = _missing_package_of_loss(kind)
    if package_of_loss:
        return f"its loss needs the package {package_of_loss}, which is not installed"
    return f"no small config and batch of ours suits it: {one_line(error)}"


def why_not_built(kind: type[nn.Module], error: BaseException) -> str:
    """Return the reason why a small model of a class cannot be built.

    Args:
        kind: The class.
        error: What building it ended with.
    """
    by_default = None if is_final(error) else _default_error(kind)
    if by_default is not None and is_final(by_default):
        return why_not_trained(kind, by_default)
    if type(by_default) is type(error):
        return f"transformers cannot build it from its own default config: {one_line(error)}"
    return why_not_trained(kind, error)


def is_final(error: BaseException) -> bool:
    """Whether no other batch would help: the model says that it cannot be trained here."""
    text = str(error)
    return isinstance(error, NotImplementedError | ImportError) or bool(_UNTRAINABLE.search(text))


class Progress:
    """Counts the module calls of runs, to tell how far each got before it failed."""

    def __init__(self) -> None:
        self.calls = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count from 0."""
        self.calls = 0
        handle = register_module_forward_pre_hook(self._count)
        try:
            yield
        finally:
            handle.remove()

    def _count(self, *_: Any) -> None:
        self.calls += 1


def _missing_package_of_loss(kind: type[nn.Module]) -> str | None:
    """Return the package that matches boxes in the losses of detection models, if it is missing."""
    loss = LOSS_MAPPING.get(kind.__name__)
    if loss is None or importlib.util.find_spec("scipy") is not None:
        return None
    used = [loss, *vars(sys.modules[loss.__module__]).values()]
    modules = {getattr(value, "__module__", None) or "" for value in used}
    losses = [sys.modules[name] for name in modules if name.startswith("transformers.loss")]
    return "scipy" if any("HungarianMatcher" in inspect.getsource(m) for m in losses) else None


def _default_error(kind: Any) -> BaseException | None:
    """Return what building a class from its default config ends with; ``None`` when it works."""
    try:
        with torch.device("meta"):
            kind(kind.config_class())
    except Exception as error:  # whatever a class does with the defaults of its config
        return error
    return None
