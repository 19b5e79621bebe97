"""One stage's failure stops all, is raised once with stage and block, and nothing hangs."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

from ipu_pipeline.backends.local.runner import StageThreads
from ipu_pipeline.errors import LoweringError, StageError, StallError
from ipu_pipeline.ir.schedule import Action
from ipu_pipeline.planner.schedules import PipelineShape
from ipu_pipeline.planner.schedules.kinds.one_stage import one_f_one_b
from tests.backends.local.helpers import compiled


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("sequential", [False, True])
def test_an_exception_in_a_block_names_stage_and_block(layer: int, sequential: bool) -> None:
    executable, batch = compiled(sequential=sequential)
    calls = []

    def fail(*_: object) -> None:
        calls.append(threading.current_thread().name)
        if len(calls) > 1:
            raise RuntimeError("planted fault")

    executable.forward_backward(batch)  # captured, so that the fault is met by a stage
    handle = executable.model.bert.encoder.layer[layer].register_forward_pre_hook(fail)
    stage = executable.plan.stage_of[f"bert.encoder.layer.{layer}"]
    message = (
        rf"stage {stage} failed in block 'bert.encoder.layer.{layer}' \(forward pass of "
        r"microbatch 1\): RuntimeError: planted fault"
    )
    with pytest.raises(StageError, match=message) as caught:
        executable.forward_backward(batch)
    assert isinstance(caught.value.__cause__, RuntimeError)

    handle.remove()
    assert executable.forward_backward(batch) > 0  # usable again
    executable.close()


class Fails(torch.autograd.Function):
    """Fails in its backward pass."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise ValueError("bad gradient")


@pytest.mark.parametrize(
    ("fqn", "block", "recompute"),
    [
        ("bert.encoder.layer.3.attention", "bert.encoder.layer.3", "none"),
        ("bert.encoder.layer.0", "bert.encoder.layer.0", "all"),
        ("bert.embeddings.word_embeddings", "bert.embeddings", "none"),
    ],
)
def test_a_failure_in_the_backward_pass_names_its_block(
    fqn: str, block: str, recompute: str
) -> None:
    executable, batch = compiled(recompute=recompute)
    executable.forward_backward(batch)  # captured, so that the fault is met by a stage
    calls = []

    def fail(_: object, __: object, output: Any) -> Any:
        calls.append(1)
        first, *others = output if isinstance(output, tuple) else (output,)
        failing = Fails.apply(first) if len(calls) > 1 else first
        return (failing, *others) if others else failing

    executable.model.get_submodule(fqn).register_forward_hook(fail)
    stage = executable.plan.stage_of[block]
    message = rf"stage {stage} failed in block '{block}' \(backward pass of microbatch \d\): Valu"
    with executable, pytest.raises(StageError, match=message):
        executable.forward_backward(batch)


def test_failed_steps_leave_the_weights_alone() -> None:
    executable, batch = compiled()
    before = {n: t.clone() for n, t in executable.state_dict().items()}
    executable.forward_backward(batch)
    executable.model.zero_grad()

    def fail(*_: object) -> None:
        raise RuntimeError("planted fault")

    executable.model.qa_outputs.register_forward_pre_hook(fail)
    with executable, pytest.raises(StageError):
        executable.train_step(batch)
    assert executable.global_step == 0
    assert all(torch.equal(before[n], t) for n, t in executable.state_dict().items())


def test_a_stalled_stage_is_reported_with_what_everybody_does() -> None:
    executable, batch = compiled(stall_timeout_s=0.5)
    release = threading.Event()

    def block(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            release.wait()

    executable.eval_step(batch)
    executable.model.qa_outputs.register_forward_pre_hook(block)
    message = r"no stage finished anything for \d+ s \(.*device 1 is inside 1F0"
    try:
        with pytest.raises(StallError, match=message):
            executable.eval_step(batch)
    finally:
        release.set()
    with pytest.raises(LoweringError, match="cannot run: after a failure"):
        executable.eval_step(batch)
    executable.close()


def test_waiting_stages_are_told_to_stop() -> None:
    threads = StageThreads(3, stall_timeout_s=30)
    seen: list[Action] = []

    def work(action: Action) -> None:
        seen.append(action)
        if action == Action(1, "F", 2):
            raise KeyError("planted")

    with pytest.raises(StageError, match=r"stage 1 failed .*microbatch 2.*KeyError"):
        threads.run(one_f_one_b(PipelineShape.of(3, 8)), work, [1] * 3)
    assert Action(2, "F", 2) not in seen
    threads.close()


def test_an_interrupt_stops_the_stages() -> None:
    threads = StageThreads(2, stall_timeout_s=30)

    def work(action: Action) -> None:
        if action == Action(1, "F", 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        threads.run(one_f_one_b(PipelineShape.of(2, 2)), work, [1] * 2)
    threads.close()


def test_many_schedules_in_a_row_never_hang() -> None:
    threads = StageThreads(4, stall_timeout_s=20)
    for microbatches in range(1, 40):
        done: set[Action] = set()
        threads.run(one_f_one_b(PipelineShape.of(4, microbatches)), done.add, [1] * 4)
        assert len(done) == 2 * 4 * microbatches
    threads.close()


def test_threads_end_when_nobody_holds_them_any_more() -> None:
    threads = StageThreads(2, stall_timeout_s=20)
    workers = list(threads._threads)
    del threads
    gc.collect()
    for worker in workers:
        worker.join(timeout=10)
        assert not worker.is_alive()
