"""The work of one step: what each action does, and what travels between the stages."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor, nn

from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.stages.serialize import GradientSum, add_sums
from ipu_pipeline.stages.stage import RandomKey, Stage
from ipu_pipeline.stages.training import autocast_region


class Step:
    """The work of one step: called with an action, runs that stage on that microbatch.

    Args:
        stages: Stages of every microbatch, ``[microbatch][stage]``.
        microbatches: The inputs.
        options: Precision and seed.
        global_step: Random numbers are keyed by it.
        loss_scaling: Factor of the loss before the backward pass.
        schedule: The rows that will be run.

    Attributes:
        results: What each microbatch computed, by name, in the order of the microbatches.
        busy_s: Seconds that each stage was busy.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Stage]],
        microbatches: Sequence[Microbatch],
        options: ExecutionOptions,
        global_step: int,
        loss_scaling: float,
        schedule: Schedule,
    ) -> None:
        self.stages = stages
        self.microbatches = microbatches
        self.options = options
        self.global_step = global_step
        self.loss_scaling = loss_scaling
        self.results: list[dict[str, Tensor]] = [{} for _ in microbatches]
        self.grad = torch.is_grad_enabled()
        self.schedule = schedule
        self.alone = [schedule.peak_in_flight(stage.index) == 1 for stage in stages[0]]
        self.busy_s = [0.0] * len(stages[0])
        self._values: dict[tuple[int, str], Tensor] = {}
        self._gradients: dict[tuple[int, str], dict[int, Tensor]] = defaultdict(dict)
        self._shared: list[defaultdict[nn.Parameter, GradientSum]] = [
            defaultdict(GradientSum) for _ in stages[0]
        ]
        self._lock = Lock()

    def __call__(self, action: Action) -> None:
        """Run one action; an exception carries the name of the block it came from."""
        stage = self.stages[action.microbatch][action.stage]
        started = time.perf_counter()
        try:
            with torch.set_grad_enabled(self.grad):
                if action.kind == "F":
                    self._forward(stage, action.microbatch)
                elif action.kind != "W":  # I computes both gradients, nothing is left to W
                    self._backward(stage, action.microbatch)
        except Exception as error:
            error.pipeline_block = stage.block  # type: ignore[attr-defined]
            raise
        self.busy_s[action.stage] += time.perf_counter() - started

    def _forward(self, stage: Stage, microbatch: int) -> None:
        part = self.microbatches[microbatch]
        received = {name: self._values[microbatch, name] for name in stage.receives}
        key: RandomKey = (self.options.seed, self.global_step, microbatch)
        with autocast_region(self.options.precision):
            sent, results = stage.forward(
                microbatch, part.inputs, received, key, alone=self.alone[stage.index]
            )
        with self._lock:
            self._values.update({(microbatch, name): value for name, value in sent.items()})
            self.results[microbatch].update(results)

    def _backward(self, stage: Stage, microbatch: int) -> None:
        gradients = {}
        for name in stage.sends:
            parts = self._gradients.pop((microbatch, name), {})
            self._values.pop((microbatch, name), None)
            ordered = [parts[index] for index in sorted(parts)]  # one order, whatever the timing
            if ordered:
                gradients[name] = torch.stack(ordered).sum(0) if len(ordered) > 1 else ordered[0]
        share = self.microbatches[microbatch].share
        found, shared = stage.backward(microbatch, gradients, self.loss_scaling * share)
        with self._lock:
            for name, gradient in found.items():
                self._gradients[microbatch, name][stage.index] = gradient
        for parameter, gradient in shared:  # sums of this stage, which runs in one thread
            self._shared[stage.index][parameter].add(gradient)

    def add_shared_gradients(self) -> None:
        """Add the gradients of parameters that several stages use, in the order of the stages."""
        parameters = dict.fromkeys(p for sums in self._shared for p in sums)
        for parameter in parameters:
            add_sums(parameter, (sums[parameter] for sums in self._shared if parameter in sums))

    def clear(self) -> None:
        """Forget all microbatches in flight."""
        for stages in self.stages:
            for stage in stages:
                stage.clear()
