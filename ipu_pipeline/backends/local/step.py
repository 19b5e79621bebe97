"""One step of the local target: what an action of the schedule does."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from ipu_pipeline.backends.local.vocabulary import VocabularyPasses
from ipu_pipeline.capture.glue_run import GlueRun
from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.devices import naming_snapshots
from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.stages.serialize import GradientSum, add_sums
from ipu_pipeline.stages.stage import RandomKey, Stage
from ipu_pipeline.stages.training import autocast_region


@dataclass(eq=False)
class Step:
    """The work of one step: called with an action, runs that stage on that microbatch.

    Attributes:
        stages: ``[microbatch][stage]``.
        loss_scaling: Factor of the loss before the backward pass.
        device: Where the stages are.
        glue: That of its only microbatch, if that goes on while the stages run.
        results: What each microbatch computed, by name, in the order of the microbatches.
        busy_s: Seconds that each stage was busy.
    """

    stages: Sequence[Sequence[Stage]]
    microbatches: Sequence[Microbatch]
    options: ExecutionOptions
    global_step: int
    loss_scaling: float
    schedule: Schedule
    device: torch.device
    glue: GlueRun | None = None

    def __post_init__(self) -> None:
        own = self.stages[0]
        self.results: list[dict[str, Tensor]] = [{} for _ in self.microbatches]
        self.grad = torch.is_grad_enabled()
        self.alone = [self.schedule.peak_in_flight(stage.index) == 1 for stage in own]
        self.busy_s = [0.0] * len(own)
        self._values: dict[tuple[int, str], Tensor] = {}
        self._gradients: dict[tuple[int, str], dict[int, Tensor]] = defaultdict(dict)
        self._shared: list[defaultdict[Tensor, GradientSum]] = [
            defaultdict(GradientSum)
            for _ in (*own, None)  # and of a loss apart
        ]
        self._lock = Lock()
        self.vocabulary = VocabularyPasses()

    def __call__(self, action: Action) -> None:
        """Run one action; an exception carries the name of the block it came from."""
        stage = self.stages[action.microbatch][action.stage]
        started = time.perf_counter()
        try:
            with naming_snapshots(), torch.set_grad_enabled(self.grad):
                if action.kind == "F":
                    self._forward(stage, action.microbatch)
                elif action.kind == "S":
                    self.vocabulary.softmax(stage.index, action.microbatch)
                elif action.kind == "T":
                    self.vocabulary.add_gradients(stage.index, action.microbatch)
                elif action.kind != "W":  # I computes both gradients, nothing is left to W
                    self._backward(stage, action.microbatch)
        except Exception as error:
            error.pipeline_block = stage.block  # type: ignore[attr-defined]
            raise
        self.busy_s[action.stage] += time.perf_counter() - started

    def _forward(self, stage: Stage, microbatch: int) -> None:
        part = self.microbatches[microbatch]
        received = {name: self._values[microbatch, name] for name in stage.receives}
        key: RandomKey = (self.options.seed, self.global_step, part.index)
        with autocast_region(self.options.precision, self.device):
            sent, results = stage.forward(
                microbatch, part.inputs, received, key, alone=self.alone[stage.index]
            )
        if stage.spread is not None and self.grad:
            self.vocabulary.begin(microbatch, stage.softmax_of(microbatch))
        with self._lock:
            self._values.update({(microbatch, name): value for name, value in sent.items()})
            self.results[microbatch].update(results)
        if self.glue is not None and stage.index == len(self.busy_s) - 1:
            self.glue.finish()

    def _finish_loss(self, stage: Stage, microbatch: int) -> None:
        with autocast_region(self.options.precision, self.device):
            results = stage.finish_loss(microbatch, self.vocabulary.parts_of(microbatch))
        self.results[microbatch].update(results)

    def _backward(self, stage: Stage, microbatch: int) -> None:
        if stage.spread is not None:
            self._finish_loss(stage, microbatch)
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
        self.vocabulary.add_to_parameters()

    def join(self, later: Step) -> None:
        """Add what a later part of the same step has computed, but not its gradients."""
        self.microbatches = [*self.microbatches, *later.microbatches]
        self.results += later.results
        self.busy_s = [a + b for a, b in zip(self.busy_s, later.busy_s, strict=True)]

    def clear(self) -> None:
        """Forget all microbatches in flight."""
        for stages in self.stages:
            for stage in stages:
                stage.clear()
