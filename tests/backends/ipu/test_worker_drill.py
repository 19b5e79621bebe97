"""Acceptance: a worker under the SDK's Python equals the local target, and may die anywhere.

``IPU_PIPELINE_TEST_SDK`` names that Python (3.8, torch 2.0.1, transformers 4.29.2, for example);
without it the worker runs under this one. poptorch is the stand-in in both.
"""

from __future__ import annotations

import copy
import os
import random
import re
import signal
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ipu_pipeline.errors import LoweringError, StageError
from tests.backends.ipu.emulated import ALL, Case, adamw, assert_same_weights, case

pytestmark = pytest.mark.acceptance
PYTHON = os.environ.get("IPU_PIPELINE_TEST_SDK", sys.executable)
# Architectures or options that transformers 4.29.2 has not: refused by name.
NEWER = {
    "vit": "parameter 'vit.layers.0.attention.q_proj.weight' is missing in the SDK's model",
    "llama": "does not know what the configuration sets: num_key_value_heads=2",
    "mixtral": "has no MixtralForCausalLM",
}
LAYERS = {"lxmert-qa": (-1, -1), "convnext": (2, 3)}
KILLS, STEPS = 20, 6


def _device(made: Case, make: Any = None) -> Any:
    options = {"sdk_python": f"{PYTHON} --emulate"}
    return made.compile(make, **options) if make else made.compile(**options)


@pytest.mark.parametrize("name", ALL)
def test_five_steps_equal_the_local_targets(name: str) -> None:
    made = case(name, layers=LAYERS.get(name, (2, 2)), gradient_accumulation_steps=8)
    if sys.executable != PYTHON and name in NEWER:
        with pytest.raises(LoweringError, match=NEWER[name]):
            _device(made)
        return
    with made.local() as local, _device(made) as device:
        for seed in range(5):
            loss = device.train_step(made.batch(seed)).loss
            expected = local.train_step(made.batch(seed)).loss
            assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)
        device.close()
        assert_same_weights(made.model, local.model)


@cache
def _prepared() -> tuple[Case, dict[str, Tensor]]:
    """Return a case nobody has trained, and its weights after all steps without a fault."""
    made = case()
    with copy.deepcopy(made).local(adamw) as whole:
        for seed in range(STEPS):
            whole.train_step(made.batch(seed))
        return made, {n: value.clone() for n, value in whole.state_dict().items()}


def _train_until_killed(device: Any, made: Case, path: Path) -> tuple[int, dict[str, Tensor]]:
    """Train and save every second step; return the step of the last checkpoint and its weights."""
    saved, weights = 0, {n: value.clone() for n, value in made.model.state_dict().items()}
    try:
        while True:
            device.train_step(made.batch(device.global_step))
            if device.global_step in range(2, STEPS, 2):
                device.save_checkpoint(path)
                saved = device.global_step
                weights = {n: value.clone() for n, value in made.model.state_dict().items()}
    except StageError as error:
        assert re.search(r"died by signal SIGKILL in the command '\w+'", str(error))  # noqa: PT017
    return saved, weights


@pytest.mark.parametrize("number", range(KILLS))
def test_a_worker_killed_anywhere(number: int, tmp_path: Path) -> None:
    """Killed at a random moment: named, nothing fetched is lost, and the resumed run is equal."""
    fresh, expected = _prepared()
    made, again = copy.deepcopy(fresh), copy.deepcopy(fresh)
    device = _device(made, adamw)
    delay = random.Random(number).uniform(0.0, 0.8)
    timer = threading.Timer(delay, os.kill, (device._worker._process.pid, signal.SIGKILL))
    timer.start()
    saved, weights = _train_until_killed(device, made, tmp_path / "checkpoint")
    timer.join()
    device.close()
    assert all(torch.equal(value, weights[n]) for n, value in made.model.state_dict().items())
    with _device(again, adamw) as resumed:
        if saved:
            resumed.load_checkpoint(tmp_path / "checkpoint")
        assert resumed.global_step == saved
        while resumed.global_step < STEPS:
            resumed.train_step(again.batch(resumed.global_step))
        for name, value in resumed.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
