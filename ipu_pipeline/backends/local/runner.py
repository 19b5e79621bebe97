"""Run the rows of a schedule on stage threads; one failure stops all and is raised once."""

from __future__ import annotations

import contextvars
import queue
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from ipu_pipeline.errors import LoweringError, StageError, StallError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.ops.threads import take_threads
from ipu_pipeline.planner.price import spread_stages
from ipu_pipeline.planner.schedules import PipelineShape, ScheduleKind, schedule_kind
from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.stages.stage import Stage

Work = Callable[[Action], None]
# Intra-op threads, and what to run on them.
Jobs = queue.SimpleQueue[tuple[int, Callable[[], None]] | None]
POLL_S = 0.2
# Wait so long for a thread that was told to stop; a stalled one is left behind.
JOIN_S = 2.0
_PASSES = {"F": "forward pass", "S": "softmax", "T": "gradient of the vocabulary's rows"}


class Stopped(Exception):
    """Not an error of its own: raised inside a waiting stage when another one has failed."""


def contested(stages: Sequence[Sequence[Stage]]) -> bool:
    """Whether two stages call one module in different modes, so that their threads must not meet.

    ``stages`` are ``[microbatch][stage]``.
    """
    modes: defaultdict[nn.Module, set[bool]] = defaultdict(set)
    users: defaultdict[nn.Module, set[int]] = defaultdict(set)
    for stage in {id(stage): stage for own in stages for stage in own}.values():
        for module, mode in (pair for program in stage.programs for pair in program.modes):
            modes[module].add(mode)
            users[module].add(stage.index)
    return any(len(found) > 1 and len(users[module]) > 1 for module, found in modes.items())


def shape_to_run(plan: Plan, options: ExecutionOptions) -> tuple[ScheduleKind, PipelineShape]:
    """Return the schedule and the thread of every stage: the plan's devices, where they fit it.

    Raises:
        LoweringError: The schedule is unknown, or cannot run so many stages and microbatches.
    """
    depth, devices = plan.num_stages, [stage.device for stage in plan.stages]
    try:
        kind = schedule_kind(options.schedule or plan.schedule)
    except ValueError as error:
        raise LoweringError(f"the local target: {error}") from error
    shape = PipelineShape.of(depth, plan.num_microbatches, devices, spread=spread_stages(plan))
    problem = kind.problem(shape)
    if not problem:
        return kind, shape
    for number in kind.stages_per_device:
        placed = kind.place(depth, max(1, depth // number))
        again = replace(shape, devices=placed or shape.devices)
        if not kind.problem(again):
            return kind, again
    raise LoweringError(problem)


@dataclass
class RunProgress:
    """Which actions are done, shared by all stages of one step."""

    schedule: Schedule
    done: set[Action] = field(default_factory=set)
    failure: tuple[int, Action | None, BaseException] | None = None
    running: set[Action] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)
    last_change: float = field(default_factory=time.monotonic)

    def wait_for(self, action: Action) -> None:
        """Block until everything ``action`` needs is done.

        Raises:
            Stopped: Another stage has failed.
        """
        needed = self.schedule.requirements(action)
        with self.changed:
            self.changed.wait_for(lambda: self.failure or needed <= self.done)
            if self.failure:
                raise Stopped
            self.running.add(action)

    def finish(self, action: Action) -> None:
        """Note that ``action`` is done."""
        with self.changed:
            self.done.add(action.result)
            self.running.discard(action)
            self.last_change = time.monotonic()
            self.changed.notify_all()

    def fail(self, device: int, action: Action | None, error: BaseException) -> None:
        """Stop everybody; the first failure wins."""
        with self.changed:
            self.failure = self.failure or (device, action, error)
            self.changed.notify_all()

    def describe(self) -> str:
        """Say what every device is doing or waiting for."""
        lines = []
        for device, row in enumerate(self.schedule.rows):
            running = next((a for a in row if a in self.running), None)
            waiting = next((a for a in row if a.result not in self.done), None)
            if running is not None:
                lines.append(f"device {device} is inside {running}")
            elif waiting is not None:
                missing = self.schedule.requirements(waiting) - self.done
                lines.append(
                    f"device {device} waits to start {waiting} until "
                    f"{', '.join(map(str, sorted(missing)))} is done"
                )
        return "; ".join(lines)


class StageThreads:
    """Persistent threads, one per device, that run rows of actions.

    Args:
        num_devices: Number of threads.
        stall_timeout_s: Seconds without any finished action after which a step is given up.
    """

    def __init__(self, num_devices: int, stall_timeout_s: float) -> None:
        self.stall_timeout_s = stall_timeout_s
        self._jobs: list[Jobs] = [queue.SimpleQueue() for _ in range(num_devices)]
        self._threads = [
            threading.Thread(
                target=_serve, args=(jobs,), name=f"pipeline-device-{device}", daemon=True
            )
            for device, jobs in enumerate(self._jobs)
        ]
        for thread in self._threads:
            thread.start()
        # When nobody called close(): a thread that still runs at exit can abort the process.
        self._stop = weakref.finalize(self, _stop, self._jobs, self._threads)

    def run(self, schedule: Schedule, work: Work, intra_op: Sequence[int]) -> None:
        """Run every row on its own thread, with ``intra_op`` threads of its operators.

        Raises:
            StageError: A stage raised; its exception is the cause.
            StallError: Nothing was finished for ``stall_timeout_s``.
        """
        progress = RunProgress(schedule)
        finished = [threading.Event() for _ in schedule.rows]
        for device, row in enumerate(schedule.rows):
            here = contextvars.copy_context()  # what the user has set in context variables
            job = partial(here.run, _run_row, device, row, work, progress, finished[device])
            self._jobs[device].put((intra_op[device], job))
        try:
            self._watch(progress, finished)
        except BaseException as error:
            progress.fail(-1, None, error)
            raise
        raise_failure(progress)

    def close(self) -> None:
        """Stop the threads; calling it again does nothing."""
        self._stop()

    def _watch(self, progress: RunProgress, finished: Sequence[threading.Event]) -> None:
        while not all(event.wait(POLL_S) for event in finished):
            silent_s = time.monotonic() - progress.last_change
            if silent_s > self.stall_timeout_s:
                raise StallError(
                    f"no stage finished anything for {silent_s:.0f} s "
                    f"({progress.describe()}); if a single pass really takes that "
                    "long, raise stall_timeout_s"
                )


def _serve(jobs: Jobs) -> None:
    has = 0
    while (given := jobs.get()) is not None:
        intra_op, job = given
        if intra_op != has:
            take_threads(intra_op)
            has = intra_op
        job()


def _stop(queues: Sequence[Jobs], threads: Sequence[threading.Thread]) -> None:
    for jobs in queues:
        jobs.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout=JOIN_S)


def run_sequentially(schedule: Schedule, work: Work, *, in_order: bool = False) -> None:
    """Run all actions in the calling thread, in an order that respects every dependency.

    ``in_order``: one microbatch after the other, each forward and backward.

    Raises:
        StageError: A stage raised; its exception is the cause.
    """
    progress = RunProgress(schedule)
    order: Sequence[Action] = schedule.total_order()
    if in_order:
        order = sorted(order, key=lambda action: action.microbatch)
    _run_row(0, order, work, progress, threading.Event())
    raise_failure(progress)


def raise_failure(progress: RunProgress) -> None:
    """Raise what the first failing stage raised, with its name.

    Raises:
        StageError: Some stage failed.
    """
    if progress.failure is None:
        return
    _, action, error = progress.failure
    if not isinstance(error, Exception) or action is None:
        raise error
    block = getattr(error, "pipeline_block", "")
    where = f" in block {block!r}" if block else ""
    kind = _PASSES.get(action.kind, "backward pass")
    raise StageError(
        f"stage {action.stage} failed{where} ({kind} of microbatch {action.microbatch}): "
        f"{type(error).__name__}: {error}"
    ) from error


def _run_row(
    device: int,
    row: Sequence[Action],
    work: Work,
    progress: RunProgress,
    finished: threading.Event,
) -> None:
    action: Action | None = None
    try:
        for action in row:
            progress.wait_for(action)
            work(action)
            progress.finish(action)
    except Stopped:
        pass
    except BaseException as error:
        progress.fail(device, action, error)
    finally:
        finished.set()
