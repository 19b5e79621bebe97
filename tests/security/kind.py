"""A kind of file that is read, and what several kinds need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ipu_pipeline.compiler import plan
from ipu_pipeline.ir.plan import Plan
from tests.tiny_models import TINY


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        write: Writes a good one.
        use: Reads it and does what is done with it; fails on what makes no sense.
        share: How many of a thousand mutations are of this kind: fewer where each takes long.
    """

    write: Callable[[Path], object]
    use: Callable[[Path], object]
    share: int


def finite(*numbers: float) -> None:
    """Fail unless all numbers are amounts."""
    assert all(math.isfinite(number) and number >= 0 for number in numbers), numbers


@cache
def ipu_plan() -> Plan:
    """Return a plan of a tiny model for IPUs."""
    model, batch = TINY["bert-qa"].build(batch_size=1, device="meta")
    return plan(model, batch, machine="pod4", num_stages=4, microbatches=8)
