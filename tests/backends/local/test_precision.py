"""Autocast with loss scaling, and master weights: losses and weights of plain torch doing it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.errors import CheckpointError
from ipu_pipeline.ops.master_weights import MASTER_WEIGHT, MasterWeights
from tests.tiny_models import TINY

MICROBATCHES, STEPS, CLIP, RATE = 2, 4, 0.5, 0.1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def scaler() -> torch.amp.GradScaler:
    # Overflows at first, and grows within the steps of a test.
    return torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2, backoff_factor=2**-6)


def batches(name: str) -> list[Mapping[str, Any]]:
    return [TINY[name].batch(batch_size=2 * MICROBATCHES, seed=seed) for seed in range(STEPS)]


def compiled(name: str, stages: int, dtype: torch.dtype | None = None, **options: Any) -> Any:
    model, example = TINY[name].build(dropout=False)
    model.to(dtype)
    plan = ipp.plan(model, example, num_stages=stages, microbatches=MICROBATCHES)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    options = {"max_grad_norm": CLIP, "self_check": False, **options}
    return ipp.compile(model, plan, optimizer=optimizer, **options)


def plain(
    name: str, region: Any, scaling: torch.amp.GradScaler, dtype: torch.dtype | None = None
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train in plain torch: accumulation, unscaling, clipping, a step that may be skipped."""
    model, _ = TINY[name].build(dropout=False)
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    masters = MasterWeights(optimizer)
    losses, scales = [], []
    for batch in batches(name):
        scales.append(scaling.get_scale())
        total = 0.0
        for n in range(MICROBATCHES):
            with region():
                part = {k: v[2 * n : 2 * n + 2] for k, v in batch.items()}
                loss = model(**part).loss / MICROBATCHES
            scaling.scale(loss).backward()
            total += loss.item()
        losses.append(total)
        with masters.in_place():
            scaling.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            scaling.step(optimizer)
        scaling.update()
        optimizer.zero_grad()
    return losses, scales, model.state_dict()


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest one, of the updates that SGD has made: in parts of the learning rate."""
    pairs = ((found[name].double(), expected[name].double()) for name in expected)
    return max((a - b).abs().max().item() for a, b in pairs) / RATE


# Measured: 9e-8 of the losses, 7e-7 of the updates. A cast at another place would be a rounding of
# 1e-3 (fp16) or 8e-3 (bf16) of gradients whose norm is 0.5.
@pytest.mark.parametrize(
    ("name", "precision", "stages"), [("bert-qa", "fp16", 3), ("gpt2-lm", "bf16", 2)]
)
def test_autocast_with_a_scaler_is_that_of_plain_torch(
    name: str, precision: str, stages: int
) -> None:
    theirs, dtype = scaler(), DTYPES[precision]
    losses, scales, weights = plain(name, lambda: torch.autocast("cpu", dtype=dtype), theirs)
    with compiled(name, stages, precision=precision, loss_scaling=scaler()) as executable:
        found = [executable.train_step(batch) for batch in batches(name)]
        assert executable._scaler.state() == theirs.state_dict()
        assert difference(executable.state_dict(), weights) < 1e-5
    assert [result.loss for result in found] == pytest.approx(losses, rel=1e-6)
    skips = [b < a for a, b in pairwise([*scales, theirs.get_scale()])]
    assert [result.skipped for result in found] == skips
    assert any(skips) == (precision == "fp16")


# Measured: equal bits. Weights are 16 bits wide, and one rounding of them is 4e-3 of a weight.
def test_copies_of_16_bit_weights_train_resume_and_do_not_depend_on_stages(tmp_path: Path) -> None:
    dtype, data = torch.bfloat16, batches("llama")
    losses, _, weights = plain("llama", nullcontext, scaler(), dtype)
    options = {"dtype": dtype, "loss_scaling": scaler(), "master_weights": True}
    with compiled("llama", 2, **options) as executable:
        found = [executable.train_step(batch).loss for batch in data[:2]]
        path = executable.save_checkpoint(tmp_path / "c")
        found += [executable.train_step(batch).loss for batch in data[2:]]
        state, scaling = copies(executable), executable._scaler.state()
        assert found == pytest.approx(losses, rel=1e-6)
        assert difference(executable.state_dict(), weights) < 1e-5
    options["loss_scaling"] = scaler()
    with compiled("llama", 1, **options) as executable:
        executable.load_checkpoint(path)
        assert [executable.train_step(batch).loss for batch in data[2:]] == found[2:]
        assert executable._scaler.state() == scaling
        again = copies(executable)
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    with (
        compiled("llama", 1, dtype=dtype) as executable,
        pytest.raises(CheckpointError, match="compile it with master_weights=True"),
    ):
        executable.load_checkpoint(path)


def copies(executable: Any) -> dict[str, Tensor]:
    """Return the weights, their float32 copies and momentum."""
    found = {}
    for name, parameter in executable.model.named_parameters():
        state = executable.optimizer.state[parameter]
        assert state[MASTER_WEIGHT].dtype is state["momentum_buffer"].dtype is torch.float32
        found[name] = parameter.detach().clone()
        found |= {f"{name}/{key}": value.clone() for key, value in state.items()}
    return found


def test_a_scaler_that_is_switched_off_is_refused() -> None:
    with pytest.raises(ValueError, match="loss_scaling is a GradScaler that is switched off"):
        ipp.ExecutionOptions(loss_scaling=torch.amp.GradScaler("cpu", enabled=False))
