"""What a script prints about the plan: blocks, split, and prediction against measurement."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

import typer
from torch import Tensor

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.text import describe_blocks, graph_table, milliseconds, render_table

if TYPE_CHECKING:
    from ipu_pipeline.stages.executable import Executable, StepResult


def is_first() -> bool:
    """Whether this process prints and writes files: the only one, or the first of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print for the user, once for all processes."""
    if is_first():
        typer.echo(text)


class TimedExecutable:
    """An executable that remembers how long its training steps and their stages took.

    Args:
        executable: Does the work; every other attribute is its own.
    """

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        self.step_s: list[float] = []
        self.stage_s: list[tuple[float, ...]] = []
        self.num_samples = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executable, name)

    def train_step(self, batch: Mapping[str, Tensor]) -> StepResult:
        """Run one optimizer step and take its time."""
        start_s = time.perf_counter()
        result = self.executable.train_step(batch)
        self.step_s.append(time.perf_counter() - start_s)
        self.num_samples += result.num_samples
        if result.stage_s:
            self.stage_s.append(result.stage_s)
        return result

    @property
    def samples_per_s(self) -> float:
        """Training samples per second of step time; 0 before the first step."""
        return self.num_samples / sum(self.step_s) if self.step_s else 0.0


def describe(plan: Plan) -> str:
    """Return the block table and the plan as text."""
    return f"{graph_table(plan.graph)}\n\n{plan.explain()}"


def measured_against_predicted(plan: Plan, timed: TimedExecutable) -> str:
    """Return predicted and measured seconds of every stage and of the step.

    Measured times are medians over the steps of this run, without the first, which also captures
    and warms up. A stage's time is what it computes; the step adds waiting and the optimizer.
    Where a target does not measure its stages, there is the step alone.
    """
    if not timed.step_s:
        return "no training step was run, so there is nothing to compare with the plan"
    stages = timed.stage_s[1:] or timed.stage_s
    steps = timed.step_s[1:] or timed.step_s
    rows = []
    for index, stage in enumerate(plan.stages if stages else ()):
        predicted_s = (stage.forward_s + stage.backward_s) * plan.num_microbatches
        measured_s = median(times[index] for times in stages)
        rows.append(_row(f"{index}: {describe_blocks(stage)}", predicted_s, measured_s))
    rows.append(_row("optimizer step", plan.objective_s, median(steps)))
    table = render_table(("stage", "predicted ms", "measured ms", "measured/predicted"), rows)
    return f"{table}\n{timed.samples_per_s:.1f} samples/s over {len(timed.step_s)} steps"


def _row(name: str, predicted_s: float, measured_s: float) -> tuple[str, ...]:
    ratio = f"{measured_s / predicted_s:.2f}" if predicted_s > 0 else "-"
    return name, milliseconds(predicted_s), milliseconds(measured_s), ratio


# What the local target takes from an IPU configuration; versions say who wrote the file.
_USED_LOCALLY = ("layers_per_ipu", "ipus_per_replica", "gradient_accumulation_steps")
_NOT_SETTINGS = ("replication_factor", "optimum_version", "transformers_version")


def local_note(config: IPUConfig) -> str:
    """Say which settings of an IPU configuration do nothing on the local target; ``""``: none."""
    plain = IPUConfig().to_dict()
    without_effect = [
        f"{name}={value}"
        for name, value in config.to_dict().items()
        if value != plain.get(name)
        and name not in (*_USED_LOCALLY, *_NOT_SETTINGS)
        and not name.startswith("inference_")
    ]
    lines = []
    if config.replicas() > 1:
        lines.append(
            f"note: the local target runs 1 of the {config.replicas()} replicas, so a step has "
            "fewer samples"
        )
    if without_effect:
        lines.append(f"note: without effect on the local target: {', '.join(without_effect)}")
    return "\n".join(lines)
