"""Faults that other engines had, put into ours one at a time: each is seen by the programs.

The table in ``docs/faults.md`` says where each was reported. A program that does not see a fault
would be no check of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch.nn.utils import get_total_norm

from ipu_pipeline.backends.local import executable as local
from ipu_pipeline.stages import captures
from ipu_pipeline.stages.serialize import add_sums
from tests.programs.program import Program, eager, pipelined

Fault = Callable[[], contextlib.AbstractContextManager[object]]


@contextlib.contextmanager
def clipping_by_stage() -> Iterator[None]:
    """torchtitan#596: every stage clips by the norm of its own gradients."""
    update = local.apply_update

    def faulty(optimizer, parameters, **options):
        return update(
            optimizer, parameters, total_norm=lambda all_: get_total_norm(all_[:2]), **options
        )

    with mock.patch.object(local, "apply_update", faulty):
        yield


@contextlib.contextmanager
def clipping_before_sums() -> Iterator[None]:
    """Megatron-LM#7452: gradients of shared weights are added after clipping."""
    add, update = local.Step.add_shared_gradients, local.apply_update
    late = []

    def faulty(optimizer, parameters, **options):
        parameters = list(parameters)
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, options.pop("max_grad_norm"), norm)
        for step in late:
            add(step)
        late.clear()
        return update(optimizer, parameters, **options)

    with (
        mock.patch.object(local.Step, "add_shared_gradients", late.append),
        mock.patch.object(local, "apply_update", faulty),
    ):
        yield


@contextlib.contextmanager
def ties_copied() -> Iterator[None]:
    """A tied weight is trained by the stage that owns it alone."""

    def faulty(step):
        for sums in step._shared[:1]:
            for parameter, own in sums.items():
                add_sums(parameter, [own])

    with mock.patch.object(local.Step, "add_shared_gradients", faulty):
        yield


@contextlib.contextmanager
def only_the_last_microbatch() -> Iterator[None]:
    """Automodel#3530: what was accumulated is wiped before the last microbatch."""
    backward = local.Step._backward

    def faulty(step, stage, microbatch):
        if microbatch == len(step.microbatches) - 1:
            for program in stage.programs:
                for parameter in program.module.parameters():
                    parameter.grad = None
        backward(step, stage, microbatch)

    with mock.patch.object(local.Step, "_backward", faulty):
        yield


@contextlib.contextmanager
def unscaled_gradients() -> Iterator[None]:
    """torchtitan#2972: the loss is averaged for the log only, its gradients are not."""
    accumulate = local.LocalExecutable._accumulate

    def faulty(executable, microbatches, loss_scaling):
        return accumulate(executable, microbatches, loss_scaling * len(microbatches))

    with mock.patch.object(local.LocalExecutable, "_accumulate", faulty):
        yield


@contextlib.contextmanager
def lengths_ignored() -> Iterator[None]:
    """torchtitan#4312: stages made for one length run another."""
    with mock.patch.object(captures, "described", tuple):
        yield


@contextlib.contextmanager
def gradients_of_another_microbatch() -> Iterator[None]:
    """pytorch#139404: a stage keeps the newest gradient only, whatever microbatch it is for."""
    backward = local.Step._backward
    newest: dict[str, dict[int, torch.Tensor]] = {}

    def faulty(step, stage, microbatch):
        for name in stage.sends:
            found = step._gradients.get((microbatch, name))
            if found:
                step._gradients[microbatch, name] = newest.setdefault(name, found)
        backward(step, stage, microbatch)

    with mock.patch.object(local.Step, "_backward", faulty):
        yield


FAULTS: dict[str, tuple[Fault, Program]] = {
    "clipping by stage": (clipping_by_stage, Program(clipped=True)),
    "clipping before sums": (clipping_before_sums, Program(clipped=True, tied=True)),
    "ties copied": (ties_copied, Program(tied=True)),
    "only the last microbatch": (only_the_last_microbatch, Program()),
    "unscaled gradients": (unscaled_gradients, Program()),
    "lengths ignored": (lengths_ignored, Program(lengths="change between steps")),
    "another microbatch": (gradients_of_another_microbatch, Program()),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_program_sees_the_fault(name: str) -> None:
    fault, program = FAULTS[name]
    truth = eager(program)
    assert not truth.difference(pipelined(program))
    with fault():
        try:
            difference = truth.difference(pipelined(program))
        except Exception as error:  # whatever stale stages raise
            difference = str(error)
    assert difference, f"{program} does not see {name}"
