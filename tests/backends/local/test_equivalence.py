"""Split models compute what unsplit models compute: loss and EVERY gradient, and loss curves."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import ipu_pipeline as ipp
from tests.backends.local.helpers import assert_equals_eager, planned
from tests.later import in_turn, now
from tests.tiny_models import TINY

MICROBATCHES = 4
STEPS = 4


def large_batch(name: str) -> dict[str, Tensor]:
    return TINY[name].batch(batch_size=2 * MICROBATCHES, seed=3)


# Each architecture once, each way several times.
@pytest.mark.parametrize(
    ("name", "num_stages", "schedule"),
    in_turn(TINY, (4, 2, 1), ("1f1b", "gpipe")),
)
def test_loss_and_every_gradient_equal_eager(name: str, num_stages: int, schedule: str) -> None:
    model, example = TINY[name].build()
    plan = ipp.plan(
        model, example, num_stages=num_stages, microbatches=MICROBATCHES, schedule=schedule
    )
    assert plan.num_stages == num_stages
    assert_equals_eager(model, plan, large_batch(name))


WAYS = (*product((2, 4), ("1f1b", "gpipe")),)


@pytest.mark.parametrize(
    ("name", "ways"),
    now([("gpt2-lm", WAYS[::3])], [("gpt2-lm", WAYS[::3]), *product(TINY, [WAYS])]),
)
def test_loss_curves_with_dropout_do_not_depend_on_the_split(
    name: str, ways: tuple[tuple[int, str], ...]
) -> None:
    batch = large_batch(name)

    def curve(num_stages: int, schedule: str, *, sequential: bool = False) -> list[float]:
        model, _ = TINY[name].build(dropout=True)
        plan = planned(name, dropout=True, num_stages=num_stages, microbatches=MICROBATCHES)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with ipp.compile(
            model,
            plan,
            optimizer=optimizer,
            schedule=schedule,
            sequential=sequential,
            self_check=False,
        ) as executable:
            return [executable.train_step(batch).loss for _ in range(STEPS)]

    reference = curve(1, "1f1b")
    assert reference[-1] < reference[0]
    for num_stages, schedule in ways:
        assert curve(num_stages, schedule) == pytest.approx(reference, rel=1e-5)
    assert curve(2, "1f1b", sequential=True) == pytest.approx(reference, rel=1e-5)


# Gradients of each: test_schedules.py.
@pytest.mark.acceptance
def test_every_schedule_gives_the_same_losses() -> None:
    model, example = TINY["gpt2-lm"].build(dropout=True)
    batches = [TINY["gpt2-lm"].batch(batch_size=samples, seed=3) for samples in (12, 5)]
    plan = ipp.plan(model, example, num_stages=3, microbatches=6)
    losses = {}
    for name in ("1f1b", "gpipe", "interleaved", "popart"):
        with ipp.compile(model, plan, schedule=name, self_check=False) as executable:
            losses[name] = [executable.forward_backward(batch) for batch in batches]
    assert losses == dict.fromkeys(losses, losses["1f1b"])


def test_dropout_is_really_on() -> None:
    model, example = TINY["bert-qa"].build(dropout=True)
    plan = ipp.plan(model, example, num_stages=2, microbatches=1)
    losses = []
    for seed in (1, 2):
        with ipp.compile(model, plan, seed=seed, self_check=False) as executable:
            losses.append(executable.forward_backward(example))
    assert losses[0] != losses[1]
