"""What is looked at between microbatches, to see whether they may overlap."""

from __future__ import annotations

import shlex
from types import SimpleNamespace
from typing import Any

from torch import nn

from ipu_pipeline.train.order import Watch


class _Lazy(dict[str, int]):
    """Computes its members, as transformers' mappings of all models do."""

    def items(self) -> Any:
        raise AssertionError("its members are computed")


LAZY = _Lazy(one=1)


class _Trainer:
    def __init__(self) -> None:
        self.model = nn.Linear(1, 1)
        self.callback_handler = SimpleNamespace(callbacks=[])

    def compute_loss(self) -> Any:
        return LAZY, shlex.quote("")


def test_globals_of_the_code_are_watched_and_not_computed() -> None:
    """Nor are those of Python's own modules, which its threads change at any time."""
    watch = Watch(_Trainer(), frozenset())
    before = watch.state()
    assert "_find_unsafe" in vars(shlex)
    assert "_find_unsafe" not in before
    LAZY["two"] = 2
    changed = {name for name, value in watch.state().items() if before[name] != value}
    assert changed == {"LAZY"}
