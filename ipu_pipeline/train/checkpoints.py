"""The thin loop's checkpoints: ``checkpoint-<step>`` folders, the newest one, rotation, resume."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ipu_pipeline.checkpoint import MANIFEST, is_complete, remove_directory, restore_previous
from ipu_pipeline.errors import CheckpointError
from ipu_pipeline.stages.executable import Executable
from ipu_pipeline.train.arguments import TrainingArguments
from ipu_pipeline.train.data import EpochBatches
from ipu_pipeline.train.progress import Progress

logger = logging.getLogger(__name__)

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class Checkpoints:
    """Writes, rotates and resumes; leaving the block waits for what is still being written.

    What ``sampler`` says about the data has to be the same on resume.
    """

    def __init__(
        self,
        executable: Executable,
        arguments: TrainingArguments,
        scheduler: LRScheduler,
        sampler: EpochBatches,
        tokenizer: Any = None,
    ) -> None:
        self._executable = executable
        self._arguments = arguments
        self._scheduler = scheduler
        self._data = sampler.describe()
        self._tokenizer = tokenizer
        self._being_saved: Path | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # The error that ended the run goes on; that of a save is logged by its writer.
        with contextlib.suppress(*() if error is None else (Exception,)):
            self._settle()

    def resume(self, progress: Progress) -> None:
        """Load the checkpoint that is asked for, if one is; every process calls this.

        Raises:
            CheckpointError: It cannot be loaded, or the data, its batches or their seed differ.
        """
        path = agreed_resume_checkpoint(self._executable, self._arguments)
        if path is None:
            return
        extra = self._executable.load_checkpoint(path)
        try:
            saved = extra["training"]
            progress.restore(saved)
            before: Mapping[str, Any] = saved["data"]
            self._scheduler.load_state_dict(dict(saved["scheduler"]))
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} was not written by train() of this version ({error!r}), so there is no "
                "data position to resume from; load it with executable.load_checkpoint and train "
                "without resume_from_checkpoint"
            ) from error
        changed = [
            f"{name} was {before.get(name)} and is {value}"
            for name, value in self._data.items()
            if before.get(name) != value
        ]
        if changed:
            raise CheckpointError(
                f"{path} cannot be continued batch for batch: {', '.join(changed)}; restore them, "
                "or load it with executable.load_checkpoint and train without "
                "resume_from_checkpoint"
            )
        logger.info("resuming from %s at step %d", path, progress.state.global_step)

    def save(self, progress: Progress) -> None:
        """Write ``checkpoint-<step>``; then delete those beyond ``save_total_limit``.

        With ``async_save`` the deletion waits for the next save, or the end.
        """
        self._settle()
        step = progress.state.global_step
        path = self._arguments.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        saved = {"data": self._data, "scheduler": self._scheduler.state_dict()}

        def add_files(folder: Path) -> None:  # for people and tools: resuming does not read them
            text = json.dumps(progress.to_json()["state"], indent=2, sort_keys=True) + "\n"
            (folder / "trainer_state.json").write_text(text, encoding="utf-8")
            if self._tokenizer is not None:
                self._tokenizer.save_pretrained(folder)

        self._executable.save_checkpoint(
            path,
            extra={"training": progress.to_json() | saved},
            blocking=not self._arguments.async_save,
            attach=add_files,
        )
        self._being_saved = path
        if not self._arguments.async_save:
            self._settle()

    def _settle(self) -> None:
        """Wait until the last checkpoint is complete; only then delete what is too old."""
        newest, self._being_saved = self._being_saved, None
        if newest is None:
            return
        self._executable.wait_for_checkpoint()
        if self._arguments.should_save:
            rotate_checkpoints(newest, self._arguments.save_total_limit)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the complete checkpoints in ``output_dir`` by step; others are passed over."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and is_complete(p)]
    return sorted(found, key=_step)


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the complete checkpoint with the highest step, ``None`` if there is none."""
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def rotate_checkpoints(newest: Path, limit: int | None) -> None:
    """Delete the oldest complete checkpoints beside ``newest``, which is complete and stays.

    Age is the time of writing, not the step: folders of an earlier run go first.
    """
    if limit is None:
        return
    others = [p for p in list_checkpoints(newest.parent) if p != newest]
    by_age = sorted(others, key=lambda p: ((p / MANIFEST).stat().st_mtime_ns, _step(p)))
    for path in by_age[: max(0, len(by_age) + 1 - limit)]:
        logger.info("deleting %s: save_total_limit is %d", path, limit)
        remove_directory(path)


def agreed_resume_checkpoint(executable: Executable, arguments: TrainingArguments) -> Path | None:
    """Return what :func:`find_resume_checkpoint` does on the first process, on every process.

    Others may look at another disk, or a moment too early or too late.

    Raises:
        CheckpointError: The newest one is asked for and the first process finds none.
    """
    found, problem = None, ""
    try:
        if arguments.should_save:  # finish or undo replacements that were cut off
            for item in arguments.folder.glob(f".{PREFIX_CHECKPOINT_DIR}-*.previous"):
                name = item.name.removeprefix(".").removesuffix(".previous")
                restore_previous(item.with_name(name))
        found = find_resume_checkpoint(arguments)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    agreed, problem = executable.broadcast((found and str(found), problem))
    if problem:
        raise CheckpointError(problem)
    return None if agreed is None else Path(agreed)


def find_resume_checkpoint(arguments: TrainingArguments) -> Path | None:
    """Return the checkpoint that ``resume_from_checkpoint`` asks for, ``None`` to start afresh.

    A folder is itself; ``latest`` (or ``true``) the newest in ``output_dir``; ``auto`` the newest
    if there is one.

    Raises:
        CheckpointError: The newest one is asked for and there is none.
    """
    wanted = arguments.resume_from_checkpoint
    if not wanted or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() not in ("auto", "latest", "true"):
        return Path(wanted)
    latest = latest_checkpoint(arguments.folder)
    if latest is None and str(wanted).lower() != "auto":
        raise CheckpointError(
            f"resume_from_checkpoint is {wanted!r} and {arguments.output_dir} holds no complete "
            "checkpoint; name one, or use 'auto' to start afresh when there is none"
        )
    return latest


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1
