"""Programs of ``tests/programs``, a list of them in every process."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from tests.programs.census import outcome
from tests.programs.program import Program


def outcomes(programs: Sequence[Program]) -> list[str]:
    """Return what each of them is, as this process sees it."""
    warnings.filterwarnings("ignore")
    return [outcome(program, target="distributed") for program in programs]


torch.set_num_threads(1)
