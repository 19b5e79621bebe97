"""The progress bar: steps, loss, learning rate, samples per second, time left."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

# Speed is shown over about this many recent steps.
_RECENT = 0.9


class TrainingProgress(TrainerCallback):
    """A transformers callback that draws the bar and prints what is logged.

    Args:
        console: Where to draw; ``None`` for the terminal. Without a terminal only lines are
            printed.
        disable: Draw and print nothing.
    """

    def __init__(self, console: Console | None = None, *, disable: bool = False) -> None:
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("lr {task.fields[lr]:.2e}"),
            TextColumn("{task.fields[speed]:.1f} samples/s"),
            TimeRemainingColumn(),
            console=console,
            disable=disable,
        )
        self.disable = disable
        self._task: TaskID | None = None
        self._last_s = 0.0
        self._samples = 0.0
        self._seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Start the bar at the step training resumes from."""
        if state.is_world_process_zero:
            self._task = self.progress.add_task(
                "train", total=state.max_steps, completed=state.global_step, loss=0, lr=0, speed=0
            )
            self.progress.start()
        self._last_s = time.perf_counter()

    def advance(self, *, loss: float, learning_rate: float, num_samples: int) -> None:
        """Count one optimizer step over ``num_samples`` samples."""
        now_s = time.perf_counter()
        self._samples = _RECENT * self._samples + num_samples
        self._seconds = _RECENT * self._seconds + now_s - self._last_s
        self._last_s = now_s
        if self._task is not None:
            speed = self._samples / max(self._seconds, 1e-9)
            self.progress.update(self._task, advance=1, loss=loss, lr=learning_rate, speed=speed)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Print one line above the bar."""
        logs = kwargs.get("logs") or {}
        if self._task is None or self.disable:
            return
        items = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in logs.items())
        line = f"step {state.global_step}  {'  '.join(items)}"
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def restart_clock(self) -> None:
        """Leave the time since the last step (an evaluation, a save) out of the speed."""
        self._last_s = time.perf_counter()

    def stop(self) -> None:
        """Take the bar down; calling it again does nothing."""
        self.progress.stop()
