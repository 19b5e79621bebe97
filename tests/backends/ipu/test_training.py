"""Acceptance: training on the stand-in equals the local target."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.backends.ipu.emulated import adamw, assert_same_weights, case, sessions_of, sgd
from tests.later import now, one_in

pytestmark = pytest.mark.usefixtures("poptorch")
STEPS = 3


def _train_both(made: Any, make: Any = sgd, **options: Any) -> tuple[list[float], list[float]]:
    """Train on both targets, compare the weights, return the losses."""
    with made.local(make, **options) as local:
        device = made.compile(make, **options)
        batches = [made.batch(seed) for seed in range(STEPS)]
        ours = [device.train_step(batch).loss for batch in batches]
        theirs = [local.train_step(batch).loss for batch in batches]
        device.close()
        assert_same_weights(made.model, local.model)
    return ours, theirs


SHAPES = [(1, 4, (2, 2)), (2, 4, (2, 2)), (4, 8, (1, 3)), (1, 16, (1, 1, 1, 1))]
OPTIMIZERS = [(sgd, adamw), (adamw, sgd)] * 2


@pytest.mark.parametrize(
    ("make", "replicas", "accumulation", "layers"),
    one_in(
        3,
        ((make, *shape) for shape, both in zip(SHAPES, OPTIMIZERS, strict=True) for make in both),
    ),
)
def test_losses_and_weights_equal_the_local_targets(
    make: Any, replicas: int, accumulation: int, layers: tuple[int, ...]
) -> None:
    made = case(
        layers=layers, replication_factor=replicas, gradient_accumulation_steps=accumulation
    )
    ours, theirs = _train_both(made, make)
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("bert-mlm", [0, 1, 2, 0]),
        pytest.param("gpt2-lm", [0, 1, 2, 0], marks=pytest.mark.acceptance),
        # the decoder's embedding comes back to the table's IPU, and so does the head
        pytest.param("bart", [0, 1, 0, 2, 0], marks=pytest.mark.acceptance),
        ("t5", [0, 1, 0, 2, 0]),
        pytest.param("whisper", [0, 1, 0, 2, 0], marks=pytest.mark.acceptance),
    ],
)
def test_tied_weights_come_back_to_their_ipu(name: str, devices: list[int]) -> None:
    made = case(name, layers=(0, 2, 2), gradient_accumulation_steps=9)
    assert [stage.device for stage in made.plan.stages] == devices
    # The stand-in takes the mean of each microbatch, as the local target does in training.
    ours, theirs = _train_both(made)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_recomputation_and_serialization_change_nothing() -> None:
    # A table counts as large, and is cut, from 4096 rows.
    large = {"vocab_size": 4098}
    plain = case("bert-mlm", changes=large, gradient_accumulation_steps=8)
    sliced = case(
        "bert-mlm",
        changes=large,
        gradient_accumulation_steps=8,
        embedding_serialization_factor=3,
        recompute_checkpoint_every_layer=True,
    )
    assert sliced.plan.stages[0].serialize == {"bert.embeddings": 3}
    assert sliced.plan.stages[-1].serialize == {"cls": 3}
    device = plain.compile()
    for seed in range(STEPS):
        device.train_step(plain.batch(seed))
    device.close()
    device = sliced.compile()
    for seed in range(STEPS):
        device.train_step(sliced.batch(seed))
    program = sessions_of(device).training.program
    assert any(block.serialized for block in program.blocks)
    assert sum(block.checkpoints for block in program.blocks) == 5
    device.close()
    assert_same_weights(plain.model, sliced.model)


@pytest.mark.parametrize("mode", now(["all", "final"], ["all", "sum", "final", "default"]))
def test_the_loss_under_every_output_mode(mode: str) -> None:
    made = case(replication_factor=2, output_mode=mode)
    batch = made.batch()
    with made.local() as local:
        every = [
            float(local.model(**{n: v[start : start + 2] for n, v in batch.items()}).loss.detach())
            for start in range(0, 16, 2)
        ]
        local.train_step(batch)
        device = made.compile()
        loss = device.train_step(batch).loss
        device.close()
        assert_same_weights(made.model, local.model)
    # Samples lie as [accumulation step][replica][micro batch]: the last of each replica is last.
    expected = every[-2:] if mode in ("final", "default") else every
    assert loss == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_device_iterations_are_optimizer_steps() -> None:
    made = case(device_iterations=3)
    first = made.batch()
    with made.local() as local:
        losses = [
            local.train_step({n: v[start : start + 8] for n, v in first.items()}).loss
            for start in (0, 8, 16)
        ]
        with made.compile() as device:
            result = device.train_step(first)
            assert device.global_step == 3
            assert result.num_samples == 24
            assert result.loss == pytest.approx(sum(losses) / 3, abs=1e-6)
        assert_same_weights(made.model, local.model)


def test_clipping_and_loss_scaling() -> None:
    ours, theirs = _train_both(case(), max_grad_norm=0.1, loss_scaling=64.0)
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_a_scheduler_reaches_the_device() -> None:
    made = case()
    with made.local() as local, made.compile() as device:
        for executable in (local, device):
            scheduler = torch.optim.lr_scheduler.LambdaLR(
                executable.optimizer, lambda n: 1 / (n + 1)
            )
            for seed in range(4):
                # pytest turns warnings into errors: torch must believe that the optimizer stepped
                executable.train_step(made.batch(seed))
                scheduler.step()
        device.close()
        assert_same_weights(made.model, local.model)


def test_parameter_groups_keep_their_numbers() -> None:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
        others = [p for n, p in model.named_parameters() if not n.endswith("bias")]
        groups = [{"params": biases, "weight_decay": 0.0}, {"params": others, "lr": 2e-3}]
        return torch.optim.AdamW(groups, lr=1e-3, eps=1e-3, weight_decay=0.1)

    _train_both(case(), make)


def test_momentum() -> None:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    _train_both(case(), make)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_variants_with_padding(attention: str) -> None:
    made = case()
    made.model.set_attn_implementation(attention)
    batch = made.batch()
    batch["attention_mask"][:, -5:] = 0
    with made.local() as local, made.compile() as device:
        pair = [device.train_step(batch).loss, local.train_step(batch).loss]
        assert pair[0] == pytest.approx(pair[1], abs=1e-6)
