"""Programs of ``tests/programs``, a list of them in every process."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

import ipu_pipeline as ipp
from ipu_pipeline.stages.loss_shares import MixedSamplesError
from tests.backends.local.test_batch_losses import Model, planned, uneven_batch
from tests.backends.local.test_mixed_samples import contrast
from tests.programs.census import outcome
from tests.programs.program import Program


def outcomes(programs: Sequence[Program]) -> list[str]:
    """Return what each of them is, as this process sees it."""
    warnings.filterwarnings("ignore")
    return [outcome(program, target="distributed") for program in programs]


def mixed_samples() -> list[str]:
    """Return the error of a loss that mixes samples, and its value where that is asked for."""
    model, batch = Model(contrast), uneven_batch()
    plan, found = planned(model, batch, 4), []
    for options in ({}, {"loss_weights": "samples"}):
        with ipp.compile(model, plan, target="distributed", **options) as executable:
            try:
                found.append(f"{executable.forward_backward(batch):.5f}")
            except MixedSamplesError as error:
                found.append(str(error))
    return found


torch.set_num_threads(1)
