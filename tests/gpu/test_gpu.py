"""One GPU: what plain torch computes there; skipped where torch sees none."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

import ipu_pipeline as ipp
from ipu_pipeline.errors import StageError
from ipu_pipeline.train.trainer import PipelineTrainer
from tests.tiny_models import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
STEPS, RATE = 4, 0.1


def curve(name: str, stages: int, *, dropout: bool = False, **options: Any) -> list[float]:
    model, example = TINY[name].build(dropout=dropout)
    plan = ipp.plan(model, example, num_stages=stages, microbatches=2)
    batch = TINY[name].batch(batch_size=4, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with ipp.compile(model, plan, optimizer=optimizer, device="cuda", **options) as executable:
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        return [executable.train_step(batch).loss for _ in range(STEPS)]


def eager(name: str, precision: str) -> list[float]:
    model, _ = TINY[name].build(dropout=False)
    model.cuda()
    batch = TINY[name].batch(batch_size=4, seed=3)
    batch = {k: v.cuda() for k, v in batch.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    losses = []
    for _ in range(STEPS):
        total = 0.0
        for n in range(2):
            part = {k: v[2 * n : 2 * n + 2] for k, v in batch.items()}
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                loss = model(**part).loss / 2
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(total)
    return losses


# One rounding of a 16-bit product is 8e-3 (bf16) and 1e-3 (fp16) of it; kernels may differ.
@pytest.mark.parametrize("name", ["llama", "bert-qa", "t5"])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-4), ("bf16", 8e-3), ("fp16", 2e-3)]
)
def test_losses_are_those_of_plain_torch(name: str, precision: str, tolerance: float) -> None:
    expected = eager(name, precision)
    for stages in (1, 2):
        found = curve(name, stages, precision=precision)
        assert found == pytest.approx(expected, rel=tolerance)


def test_dropout_does_not_depend_on_the_split() -> None:
    assert curve("bert-qa", 1, dropout=True) == pytest.approx(
        curve("bert-qa", 3, dropout=True), rel=1e-4
    )


def test_compiled_blocks_compute_what_eager_ones_do() -> None:
    assert curve("llama", 2, compile_blocks=True) == pytest.approx(curve("llama", 2), rel=1e-4)


def test_one_process_with_interleaved_stages_is_the_local_target() -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with mock.patch.dict(os.environ, {**own, "MASTER_PORT": port}):
        found_losses = curve(
            "llama", 2, target="distributed", schedule="interleaved", precision="bf16"
        )
    assert not dist.is_initialized()
    assert found_losses == pytest.approx(curve("llama", 2, precision="bf16"), rel=8e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_trainer_trains_as_transformers_does(tmp_path: Path, precision: str) -> None:
    found = []
    for kind, extra in ((Trainer, {}), (PipelineTrainer, {"num_stages": 2})):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), report_to="none", save_strategy="no", logging_steps=1,
            max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            optim="sgd", learning_rate=RATE, disable_tqdm=True, **{precision: True},
        )  # fmt: skip
        model, _ = TINY["bert-qa"].build(dropout=False)
        batch = TINY["bert-qa"].batch(batch_size=4 * STEPS, seed=3)
        rows = [{k: v[n] for k, v in batch.items()} for n in range(4 * STEPS)]
        trainer = kind(model=model, args=arguments, train_dataset=rows, **extra)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[1] == pytest.approx(found[0], rel=8e-3)


def test_want_of_memory_leaves_a_snapshot() -> None:
    limit = 64 << 20
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + limit) / total)
    try:
        model, example = TINY["llama"].build(dropout=False)
        plan = ipp.plan(model, example, num_stages=2, microbatches=2)
        batch = TINY["llama"].batch(batch_size=16384, seed=3)
        with (
            ipp.compile(model, plan, device="cuda", self_check=False) as executable,
            pytest.raises(StageError, match=r"stage \d failed.*a snapshot of the memory is in"),
        ):
            executable.forward_backward(batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
