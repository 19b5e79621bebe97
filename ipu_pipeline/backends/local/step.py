"""One step of the local target: what an action of the schedule does.

A vocabulary that is spread over stages has passes of its own. Its table stays one tensor, of which
each stage reads its own rows and adds to their gradient; lookups in it are those of their blocks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor, nn

from ipu_pipeline.capture.glue_run import GlueRun
from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.devices import naming_snapshots
from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.stages.serialize import GradientSum, add_gradient, add_sums
from ipu_pipeline.stages.stage import RandomKey, Stage
from ipu_pipeline.stages.training import autocast_region
from ipu_pipeline.stages.vocabulary import KeptSoftmax, SoftmaxPart, SpreadLoss, softmax_part


@dataclass(eq=False)
class Step:
    """The work of one step: called with an action, runs that stage on that microbatch.

    Attributes:
        stages: ``[microbatch][stage]``.
        loss_scaling: Factor of the loss before the backward pass.
        device: Where the stages are.
        glue: That of its only microbatch, if that goes on while the stages run.
        replica_of: The replica of every microbatch; those behind the first one add up gradients
            of their own.
        results: What each microbatch computed, by name, in the order of the microbatches.
        busy_s: Seconds that each stage was busy, in all replicas together.
    """

    stages: Sequence[Sequence[Stage]]
    microbatches: Sequence[Microbatch]
    options: ExecutionOptions
    global_step: int
    loss_scaling: float
    schedule: Schedule
    device: torch.device
    glue: GlueRun | None = None
    replica_of: Sequence[int] | None = None

    def __post_init__(self) -> None:
        own = self.stages[0]
        self.results: list[dict[str, Tensor]] = [{} for _ in self.microbatches]
        self.grad = torch.is_grad_enabled()
        self.alone = [self.schedule.peak_in_flight(stage.index) == 1 for stage in own]
        self.busy_s = [0.0] * len(own)
        self._values: dict[tuple[int, str], Tensor] = {}
        self._gradients: dict[tuple[int, str], dict[int, Tensor]] = defaultdict(dict)
        # By replica and stage, which runs in one thread; the last one is of a loss apart.
        replicas = 1 + max(self.replica_of or [0])
        self._shared: list[defaultdict[Tensor, GradientSum]] = [
            defaultdict(GradientSum) for _ in range(replicas * len(own) + 1)
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
        with self._lock:
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
        replica = 0 if self.replica_of is None else self.replica_of[microbatch]
        sums = self._shared[replica * len(self.stages[0]) + stage.index]
        found, shared = stage.backward(
            microbatch, gradients, self.loss_scaling * share, sums if replica else None
        )
        with self._lock:
            for name, gradient in found.items():
                self._gradients[microbatch, name][stage.index] = gradient
        for parameter, gradient in shared:
            sums[parameter].add(gradient)

    def add_shared_gradients(self) -> None:
        """Add the gradients of parameters that stages or replicas share, in their order."""
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


# ---- a vocabulary that is spread over the stages of one process -------------------------------


class VocabularyPasses:
    """What the stages compute of the softmax of a step's microbatches."""

    def __init__(self) -> None:
        self._losses: dict[int, SpreadLoss] = {}
        self._parts: dict[int, dict[int, Sequence[SoftmaxPart]]] = {}
        self._kept: dict[tuple[int, int], Sequence[KeptSoftmax]] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._lock = Lock()

    def begin(self, microbatch: int, loss: SpreadLoss) -> None:
        """Take what the loss of a microbatch needs."""
        self._losses[microbatch] = loss

    def softmax(self, stage: int, microbatch: int) -> None:
        """Compute the part of one stage."""
        loss = self._losses[microbatch]
        first, end = loss.table.rows[stage]
        weight_RH = loss.table.parameter.detach()[first:end]
        pairs = []
        for query in loss.queries:
            bias_R = None if query.bias_V is None else query.bias_V.detach()[first:end]
            pairs.append(softmax_part(query, weight_RH, bias_R, first))
        with self._lock:
            self._parts.setdefault(microbatch, {})[stage] = [part for part, _ in pairs]
            self._kept[microbatch, stage] = [kept for _, kept in pairs]

    def parts_of(self, microbatch: int) -> dict[int, Sequence[SoftmaxPart]]:
        """Return the parts of all stages, once."""
        return self._parts.pop(microbatch)

    def add_gradients(self, stage: int, microbatch: int) -> None:
        """Add the gradient of a stage's rows, in the order of its microbatches."""
        loss = self._losses[microbatch]
        first, end = loss.table.rows[stage]
        with self._lock:
            kept = self._kept.pop((microbatch, stage))
            if not any(number == microbatch for number, _ in self._kept):
                del self._losses[microbatch]
        for one, given in zip(kept, loss.given_back, strict=True):
            if given:
                weight_VH = self._sum_of(loss.table.parameter)
                bias_V = self._sum_of(one.query.bias_V)
                one.add_gradients(
                    given[stage],
                    None if weight_VH is None else weight_VH[first:end],
                    None if bias_V is None else bias_V[first:end],
                )

    def add_to_parameters(self) -> None:
        """Add the sums of all rows to ``.grad``, behind what other blocks have added."""
        for parameter, gradient in self._gradients.items():
            add_gradient(parameter, gradient)
        self._gradients.clear()
        self._losses.clear()

    def _sum_of(self, parameter: nn.Parameter | None) -> Tensor | None:
        """Return the gradient that all stages add their rows to; None without one."""
        if parameter is None or not parameter.requires_grad:
            return None
        with self._lock:
            if parameter not in self._gradients:
                self._gradients[parameter] = torch.zeros_like(parameter)
            return self._gradients[parameter]
