"""The thin loop's checkpoints: ``checkpoint-<step>`` folders, the newest one, rotation, resume."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ipu_pipeline.checkpoint import MANIFEST, read_extra, remove_directory
from ipu_pipeline.errors import CheckpointError, PipelineError
from ipu_pipeline.stages.executable import Executable
from ipu_pipeline.train.arguments import TrainingArguments
from ipu_pipeline.train.data import EpochBatches
from ipu_pipeline.train.output_folder import (
    begin_run,
    checkpoints_in,
    locked,
    newest_checkpoint,
    step_of,
)
from ipu_pipeline.train.progress import Progress, check_like

logger = logging.getLogger(__name__)


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
        self._saves = arguments.save_strategy != SaveStrategy.NO
        self._run_id = ""
        self._lock = contextlib.ExitStack()
        self._being_saved: Path | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # The error that ended the run goes on; that of a save is logged by its writer.
        with self._lock, contextlib.suppress(*() if error is None else (Exception,)):
            self._settle()

    def resume(self, progress: Progress) -> None:
        """Begin to train into the folder, from the checkpoint that is asked for, if one is.

        Every process calls this. The first one has the folder for itself from here to the end of
        the block, if anything is to be saved.

        Raises:
            CheckpointError: Another run trains into the folder; the checkpoint cannot be loaded;
                or the data, its batches or their seed differ. Of all processes alike.
        """
        folder = self._arguments.folder
        with contextlib.ExitStack() as lock:
            if self._saves:
                self._agreed(lambda: lock.enter_context(locked(folder)))
            found = self._agreed(lambda: str(find_resume_checkpoint(self._arguments) or ""))
            path = Path(found) if found else None
            if path is not None:
                self._load(path, progress)
            if self._saves:
                self._run_id = self._agreed(lambda: self._begin(path))
            self._lock = lock.pop_all()

    def _begin(self, path: Path | None) -> str:
        """Begin a run as :func:`begin_run` does; what a kill has left of a rotation is deleted."""
        folder = self._arguments.folder
        run_id = begin_run(folder, path, run_of)
        if path and path.absolute().parent == folder.absolute() and run_of(path) == run_id:
            rotate_checkpoints(path, self._arguments.save_total_limit)
        return run_id

    def _agreed(self, work: Callable[[], str | None]) -> str:
        """Return what ``work`` returns on the first process, or raise its error, on all of them.

        Others may look at another disk, or a moment too early or too late.
        """
        found, problem = "", ""
        try:
            found = (work() if self._arguments.should_save else None) or ""
        except (PipelineError, OSError) as error:
            problem = str(error)
        found, problem = self._executable.broadcast((found, problem))
        if problem:
            raise CheckpointError(problem)
        return found

    def _load(self, path: Path, progress: Progress) -> None:
        early = read_extra(path)  # a checkpoint that cannot be read says so when it is loaded
        if early is not None:
            self._checked(path, early, progress)  # before anything is loaded
        saved = self._checked(path, self._executable.load_checkpoint(path), progress)
        progress.restore(saved)
        self._scheduler.load_state_dict(dict(saved["scheduler"]))
        if self._arguments.should_save and not self._arguments.disable_tqdm:
            tqdm.write(f"resuming from {path} at step {progress.state.global_step}")

    def _checked(self, path: Path, extra: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Return what :meth:`save` has added to a checkpoint, if training can go on from it."""
        try:
            saved: dict[str, Any] = extra["training"]
            copy.copy(progress).restore(saved)
            before: dict[str, Any] = {**saved["data"]}
            check_like(saved["scheduler"], self._scheduler.state_dict(), "scheduler")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} was not written by train() of this version ({error!r:.300}), so there is "
                "no data position to resume from; load it with executable.load_checkpoint and "
                "train without resume_from_checkpoint"
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
        return saved

    def save(self, progress: Progress) -> None:
        """Write ``checkpoint-<step>``; then delete those beyond ``save_total_limit``.

        With ``async_save`` the deletion waits for the next save, or the end.
        """
        self._settle()
        step = progress.state.global_step
        path = self._arguments.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        saved = {"data": self._data, "scheduler": self._scheduler.state_dict(), "run": self._run_id}

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


def run_of(path: Path) -> str | None:
    """Return of which run a complete checkpoint is, ``""`` if it does not say; else ``None``."""
    extra = read_extra(path)
    training = None if extra is None else extra.get("training")
    found = training.get("run", "") if isinstance(training, Mapping) else ""
    return None if extra is None else str(found)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the complete checkpoints in ``output_dir`` by step; others are passed over."""
    return list(checkpoints_in(Path(output_dir), run_of))


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the complete checkpoint with which the last run in ``output_dir`` goes on.

    That is the one with the highest step of this run; ``None`` if there is none.

    Raises:
        CheckpointError: There are some of several runs, and nothing says which is the last.
    """
    return newest_checkpoint(Path(output_dir), run_of)


def rotate_checkpoints(newest: Path, limit: int | None) -> None:
    """Delete the oldest complete checkpoints of the run whose ``newest`` is complete and stays.

    Age is the time of writing.
    """
    if limit is None:
        return
    found = checkpoints_in(newest.parent, run_of)
    others = [p for p, run in found.items() if p != newest and run == found.get(newest)]
    by_age = sorted(others, key=lambda p: ((p / MANIFEST).stat().st_mtime_ns, step_of(p)))
    for path in by_age[: max(0, len(by_age) + 1 - limit)]:
        logger.info("deleting %s: save_total_limit is %d", path, limit)
        remove_directory(path)


def find_resume_checkpoint(
    arguments: TrainingArguments, newest: Callable[[Path], Path | None] = latest_checkpoint
) -> Path | None:
    """Return the checkpoint that ``resume_from_checkpoint`` asks for, ``None`` to start afresh.

    A folder is itself; ``latest`` (or ``true``) the ``newest`` of the last run in ``output_dir``;
    ``auto`` that one if there is one.

    Raises:
        CheckpointError: The newest one is asked for and there is none.
    """
    wanted = arguments.resume_from_checkpoint
    if not wanted or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() not in ("auto", "latest", "true"):
        return Path(wanted)
    latest = newest(arguments.folder)
    if latest is None and str(wanted).lower() != "auto":
        raise CheckpointError(
            f"resume_from_checkpoint is {wanted!r} and {arguments.output_dir} holds no complete "
            "checkpoint of its last run; name one, or use 'auto' to start afresh when there is none"
        )
    return latest
