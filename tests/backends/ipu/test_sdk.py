"""Training through a worker under the SDK's own versions, on the stand-in: ``make test-sdk``."""

from __future__ import annotations

import os

import pytest

from ipu_pipeline.backends.ipu.sdk_python import VARIABLE
from tests.backends.ipu.emulated import assert_same_weights, case

pytestmark = pytest.mark.skipif(
    "--emulate" not in os.environ.get(VARIABLE, ""),
    reason=f"{VARIABLE} names no Python of the SDK with --emulate: make test-sdk",
)


# What these do while they are traced has another form in a program: see runtime/rewrites.py.
STATIC = ("deberta-v2", "gptj", "bloom", "opt", "mpnet", "bart", "mbart", "pegasus",
          "whisper", "hubert", "wav2vec2-ctc")  # fmt: skip


@pytest.mark.parametrize("name", ["bert-qa", "roberta", "gpt2-lm", *STATIC])
def test_two_steps_equal_the_local_target(name: str) -> None:
    made = case(name, gradient_accumulation_steps=8)
    with made.local() as local:
        device = made.compile()
        for seed in range(2):
            batch = made.batch(seed)
            expected = local.train_step(batch).loss
            assert device.train_step(batch).loss == pytest.approx(expected, rel=1e-6)
        device.close()
        assert_same_weights(made.model, local.model)
