"""What a dry run found: messages of all ranks, and one rank's memory against the plan's number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.backends.cluster.dryrun.memory_tally import (
    ACTIVATIONS,
    GRADIENTS,
    KINDS,
    OPTIMIZER,
    TEMPORARY,
    WEIGHTS,
)
from ipu_pipeline.backends.cluster.dryrun.messages import counted, issued, problem
from ipu_pipeline.backends.cluster.dryrun.play import Played, check_played, play
from ipu_pipeline.backends.cluster.prices.parallel_sizes import GpuSettings, dtype_of, sizes_of
from ipu_pipeline.backends.cluster.prices.rank_plan import rank_step_of
from ipu_pipeline.backends.cluster.prices.rank_step import RankBytes
from ipu_pipeline.capture.captured import model_identity
from ipu_pipeline.capture.from_config import config_named, from_config, in_dtype
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.text import GIGABYTES, render_table
from ipu_pipeline.planner.schedules.simulate import plan_shape


@dataclass(frozen=True)
class MessageCheck:
    """Whether all messages of a step meet.

    Attributes:
        schedule: Of the plan.
        ranks: Ranks of one pipeline; all of them were checked, other pipelines are equal.
        stages: Pipeline depth.
        microbatches: So many were checked; more repeat the middle.
        messages: Number of messages of those.
        problem: What does not meet, or who waits for whom; empty: nothing.
        of_rank: Number and bytes of messages by kind (``F``, ``B``), direction and peer, of the
            asked rank.
    """

    schedule: str
    ranks: int
    stages: int
    microbatches: int
    messages: int
    problem: str
    of_rank: Mapping[tuple[str, bool, int], tuple[int, int]]


def check_messages(plan: Plan, position: int = 0) -> MessageCheck:
    """Check that every send of every rank of a plan has its receive, and that none waits for ever.

    Args:
        plan: The plan.
        position: The rank of a pipeline whose messages are counted.

    Raises:
        LoweringError: Torch has no class for the schedule, or it cannot run so.
    """
    kind, shape = plan_shape(plan)
    shape = kind.shortened(shape, 4 * shape.num_stages)
    crossing = [
        [
            torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta").requires_grad_(
                spec.requires_grad
            )
            for spec in plan.tensors
            if spec.producer is not None
            and plan.stage_of[spec.producer] <= boundary
            and any(plan.stage_of[name] > boundary for name in spec.consumers)
        ]
        for boundary in range(plan.num_stages - 1)
    ]
    events = issued(
        plan.schedule, plan.num_stages, shape.num_devices, shape.num_microbatches, crossing
    )
    number = sum(
        one.sends for found in events for e in found if not e.waits for one in e.batch.transfers
    )
    return MessageCheck(
        plan.schedule, shape.num_devices, plan.num_stages, shape.num_microbatches, number,
        problem(events), counted(events[position]),
    )  # fmt: skip


@dataclass(frozen=True)
class DryRun:
    """The dry run of one rank.

    Attributes:
        world_size: Ranks of the job.
        num_microbatches: Of one pipeline in one step of the plan.
        messages: Whether all messages of a step meet.
        planned: What the plan says that the rank holds, priced as torch's operations run.
        written: The same as the plan was made: its engine may be another.
        played: What was played; ``None``: no model was given.
    """

    world_size: int
    num_microbatches: int
    messages: MessageCheck
    planned: RankBytes
    written: RankBytes
    played: Played | None = None

    @property
    def rows(self) -> dict[str, tuple[int, int]]:
        """Bytes played and planned, by kind."""
        plan, most = self.planned, {} if self.played is None else self.played.most
        at_peak = {} if self.played is None else self.played.peak
        planned = {
            WEIGHTS: plan.weights,
            GRADIENTS: plan.gradients,
            OPTIMIZER: plan.optimizer,
            ACTIVATIONS: plan.kept,
            TEMPORARY: max(plan.workspace, plan.update - plan.kept),
        }
        rest = sum(at_peak.values()) - sum(most.get(kind, 0) for kind in KINDS[:-1])
        played = {**most, TEMPORARY: max(0, rest)}
        return {kind: (played.get(kind, 0), planned[kind]) for kind in KINDS}

    @property
    def peaks(self) -> tuple[int, int]:
        """Bytes at the peak, played and planned, both without what is not played."""
        played = 0 if self.played is None else sum(self.played.peak.values())
        return played, self.planned.total - self.planned.buffers

    @property
    def difference(self) -> float:
        """How much more the plan says than was played, as a share of the latter."""
        played, planned = self.peaks
        return planned / played - 1

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        check = {
            **asdict(replace(self.messages, of_rank={})),
            "of_rank": [
                {"kind": kind, "sends": sends, "peer": peer, "number": number, "bytes": size}
                for (kind, sends, peer), (number, size) in self.messages.of_rank.items()
            ],
        }
        found: dict[str, Any] = {
            "world_size": self.world_size,
            "messages": check,
            "plan": {**asdict(self.planned), "total": self.planned.total},
            "plan_as_written": {**asdict(self.written), "total": self.written.total},
        }
        if self.played is not None:
            calls = self.played.collectives.items()
            found["rank"] = {
                **asdict(replace(self.played, collectives={})),
                "collectives": [
                    {"operation": name, "group": group, "number": number, "bytes": size}
                    for (name, group), (number, size) in calls
                ],
                "peak_bytes": self.peaks[0],
                "difference": self.difference,
            }
        return found

    def text(self) -> str:
        """Return a readable report."""
        parts = [self._messages_text()]
        if self.played is None:
            parts.append(
                f"the plan says that this rank holds {GIGABYTES(self.written.total)} GB; give "
                "--model to play it"
            )
            return "\n".join(parts)
        parts += [self._rank_text(self.played), self._memory_text(), self._calls_text(self.played)]
        return "\n\n".join(parts)

    def _messages_text(self) -> str:
        check = self.messages
        found = check.problem or "each has its counterpart, and no rank waits for ever"
        return (
            f"messages of {count_of(check.ranks, 'rank')} x {count_of(check.stages, 'stage')}, "
            f"{check.schedule}, {check.microbatches} of "
            f"{count_of(self.num_microbatches, 'microbatch')}: {check.messages} sent; {found}"
        )

    def _rank_text(self, played: Played) -> str:
        stages = ", ".join(map(str, played.stages))
        text = (
            f"rank {played.rank} of {self.world_size}: replica {played.replica}, rank "
            f"{played.position} of its pipeline, {played.tensor} of those that share a stage; "
            f"stages {stages}\nplayed on tensors without data: {played.microbatches} of "
            f"{count_of(self.num_microbatches, 'microbatch')} forward and backward in the "
            "schedule's order, sums of gradients, the update"
        )
        if self.written != self.planned:
            text += (
                "\nthe plan is for another engine, whose kernels are not played: its number is "
                f"{GIGABYTES(self.written.total)} GB; below, the plan priced for torch's operations"
            )
        return text

    def _memory_text(self) -> str:
        rows = [
            [kind, GIGABYTES(played), GIGABYTES(planned)]
            for kind, (played, planned) in self.rows.items()
        ]
        played, planned = self.peaks
        rows.append(["peak", GIGABYTES(played), GIGABYTES(planned)])
        return render_table(["GB", "played", "plan"], rows) + (
            f"\nthe plan says {100 * self.difference:+.1f} %; besides, it has "
            f"{GIGABYTES(self.planned.buffers)} GB for workspaces of libraries and buffers of "
            "collectives, which are not played"
        )

    @staticmethod
    def _calls_text(played: Played) -> str:
        rows = [
            [name, whom, str(number), GIGABYTES(size)]
            for (name, whom), (number, size) in played.collectives.items()
        ]
        return render_table(["operation", "with", "calls", "GB"], rows)


def dry_run(
    plan: Plan, rank: int, model: nn.Module | None = None, batch: Mapping[str, Tensor] | None = None
) -> DryRun:
    """Check all messages of a plan, and play one rank.

    Args:
        plan: Of the cluster backend, for training on GPUs with known kernels.
        rank: Of replica x ranks of a pipeline x ranks that share a stage, the last fastest.
        model: Its model, on ``meta``, in the dtype that the plan was made in; ``None``: nothing is
            played.
        batch: One microbatch of it.

    Raises:
        LoweringError: The plan cannot be played, or torch cannot run its schedule.
        PlanError: The plan's settings are wrong, or the model is not the plan's.
        ValueError: The job has no such rank.
    """
    check_played(plan)
    sizes = sizes_of(plan)
    world_size = plan.replicas * sizes.pp * sizes.tp
    if not 0 <= rank < world_size:
        raise ValueError(
            f"the plan's job has {count_of(world_size, 'rank')} (replicas {plan.replicas} x "
            f"pipeline {sizes.pp} x tp {sizes.tp}), from 0 to {world_size - 1}; got rank {rank}"
        )
    position = rank // sizes.tp % sizes.pp
    ours = replace(plan, settings={**plan.settings, "engine": "torch"})
    if GpuSettings.read(plan.settings).engine != "torch":
        ours = replace(ours, settings={**ours.settings, "gradient_bytes": None})
    messages = check_messages(plan, position)  # which refuses what torch's schedule cannot run
    played = None
    if model is not None and batch is not None:
        played = play(ours, model, batch, rank)
    return DryRun(
        world_size,
        plan.num_microbatches,
        messages,
        rank_step_of(ours).rank_bytes[position],
        rank_step_of(plan).rank_bytes[position],
        played,
    )


def model_of(
    plan: Plan, config: str, task: str | None = None
) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """Build a plan's model from its config, without values, and a microbatch of the plan's sizes.

    Raises:
        CaptureError: There is no such config or task.
        PlanError: The model, or its batch, is not the plan's.
    """
    sizes = {spec.name: spec.shape for spec in plan.graph.inputs}
    lengths = [shape[1] for shape in sizes.values() if len(shape) == 2]
    size: dict[str, Any] = {"seq_length": max(lengths)} if lengths else {}
    size |= {"batch_size": plan.micro_batch_size, "padded": "attention_mask" in sizes}
    with config_named(config):
        model, batch = from_config(config, task, **size)
    wrong = plan.model.differences(model_identity(model))
    made = {name: tuple(value.shape) for name, value in batch.items() if name in sizes}
    wrong += [
        f"{n}: plan {sizes[n]}, model {made.get(n)}" for n in sizes if made.get(n) != sizes[n]
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more differences" if len(wrong) > 1 else ""
        raise PlanError(
            f"the model of {config} is not the one that was planned ({wrong[0]}{more}); give the "
            "config and the --task that the plan was made with"
        )
    return in_dtype(model, batch, dtype_of(plan.graph))
