"""What training reports: running losses, the result, and transformers' result files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipu_pipeline.stages.executable import StepResult


@dataclass(frozen=True)
class TrainResult:
    """What a call of ``train`` did.

    Attributes:
        global_step: Optimizer steps tried, those before a resume included.
        training_loss: Mean loss over all these steps.
        metrics: What ``train_results.json`` holds; runtime and speeds are of this call.
        log_history: Everything logged, in order, as in ``trainer_state.json``.
        skipped_steps: Steps that an overflow skipped, of all steps.
        best_checkpoint: The checkpoint with the best metric, if one was followed.
    """

    global_step: int
    training_loss: float
    metrics: dict[str, Any]
    log_history: list[dict[str, Any]]
    skipped_steps: int = 0
    best_checkpoint: str | None = None


@dataclass
class LossMeter:
    """Losses since the start and since the last log. Its fields are kept in checkpoints.

    Steps that an overflow skipped count as steps; their losses count only if they are finite.
    """

    total: float = 0.0
    steps: int = 0
    skipped: int = 0
    window_total: float = 0.0
    window_steps: int = 0
    window_skipped: int = 0
    window_grad_norm: float | None = None

    def add(self, result: StepResult) -> None:
        """Count one step."""
        if result.skipped:
            self.skipped += 1
            self.window_skipped += 1
        else:
            self.window_grad_norm = result.grad_norm
        if math.isfinite(result.loss) or not result.skipped:
            self.total += result.loss
            self.steps += 1
            self.window_total += result.loss
            self.window_steps += 1

    @property
    def mean(self) -> float:
        """Mean loss since the start; NaN before the first step."""
        return self.total / self.steps if self.steps else math.nan

    @property
    def pending(self) -> bool:
        """Whether a step was counted since the last log."""
        return self.window_steps + self.window_skipped > 0

    def flush(self) -> dict[str, Any]:
        """Return what is to be logged now and begin a new window."""
        logs: dict[str, Any] = {
            "loss": self.window_total / self.window_steps if self.window_steps else math.nan
        }
        if self.window_grad_norm is not None:
            logs["grad_norm"] = self.window_grad_norm
        if self.window_skipped:
            logs["skipped_steps"] = self.window_skipped
        self.window_total, self.window_steps, self.window_skipped = 0.0, 0, 0
        self.window_grad_norm = None
        return logs


def save_results(output_dir: str | Path, split: str, metrics: Mapping[str, Any]) -> None:
    """Write ``<split>_results.json`` and bring ``all_results.json`` up to date.

    Args:
        output_dir: Made if it is not there.
        split: ``train``, ``eval`` or ``test``.
        metrics: JSON data; the same keys of earlier results are replaced.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    combined_path = folder / "all_results.json"
    combined: dict[str, Any] = {}
    if combined_path.is_file():
        combined = json.loads(combined_path.read_text(encoding="utf-8"))
    write_json(folder / f"{split}_results.json", metrics)
    write_json(combined_path, {**combined, **metrics})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(dict(content), indent=4, sort_keys=True) + "\n", "utf-8")
    temporary.replace(path)
