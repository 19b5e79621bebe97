"""The folder that a run trains into: one run at a time, and which checkpoints are its own.

A run is what one fresh start computes, over all its resumes. Its identity is in ``run.json`` of
the folder and in each of its checkpoints, so that an older run's never count as newest. A lock
beside it is held while somebody trains, and released by the end of that process, whatever ends it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ipu_pipeline.checkpoint import remove_abandoned
from ipu_pipeline.checkpoint.manifest import read_settings, readable
from ipu_pipeline.errors import CheckpointError, listed
from ipu_pipeline.ir.codec import from_json, read_json, to_json, write_json

logger = logging.getLogger(__name__)

RUN = "run.json"
LOCK = ".run.lock"
_TRAINER_STATE = "trainer_state.json"
# A process that was killed keeps its locks until its memory is free.
_DYING_S = 3.0
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# Returns the identity of a complete checkpoint, "" of one that has none, None of all else.
RunOf = Callable[[Path], str | None]


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        id: Differs from that of every other run.
        begun_from: Absolute path of the checkpoint that it goes on from until it has one of its
            own; ``None`` if it began afresh.
    """

    id: str
    begun_from: str | None = None

    @classmethod
    def load(cls, folder: Path) -> Run | None:
        """Return the run that ``folder`` says it is of; ``None`` where it does not say.

        Raises:
            CheckpointError: The file cannot be read.
        """
        path = folder / RUN
        if not path.exists():
            return None
        return from_json(
            cls, read_json(path, "the run", CheckpointError), str(path), CheckpointError
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have ``folder`` for this process and thread; blocks of one thread may be nested.

    What killed runs have left there under hidden names is removed.

    Raises:
        CheckpointError: Somebody else has it, or nothing can be written there.
    """
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_DYING_S)
    except Timeout:
        raise CheckpointError(
            f"{folder} is in use: {_holder(folder)} trains into it; wait until it ends, or choose "
            "another output_dir"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"cannot train into {folder}: {error.strerror or error}; choose another output_dir"
        ) from error
    try:
        _remove_rests(folder)
        if type(lock) is FileLock:  # on a file system without locks filelock writes its own file
            text = f"{os.getpid()}\n{socket.gethostname()}\n"
            Path(lock.lock_file).write_text(text, encoding="utf-8")
        yield
    finally:
        lock.release()


def is_used(folder: Path) -> bool:
    """Whether there is anything in ``folder`` but what a run leaves before its first checkpoint."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return any(name != RUN and not name.startswith(".") for name in names)


def _remove_rests(folder: Path) -> None:
    remove_abandoned(folder, f"{PREFIX_CHECKPOINT_DIR}-*")
    for item in folder.glob(f".{'[0-9a-f]' * 16}.partial"):  # of a JSON file
        item.unlink(missing_ok=True)


def checkpoints_in(folder: Path, run_of: RunOf) -> dict[Path, str]:
    """Return the identity of every complete checkpoint in ``folder``, by step."""
    if not folder.is_dir():
        return {}
    named = sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)
    return {path: found for path in named if (found := run_of(path)) is not None}


def newest_checkpoint(folder: Path, run_of: RunOf) -> Path | None:
    """Return where the last run in ``folder`` goes on; ``None`` if it has to start afresh.

    Raises:
        CheckpointError: There are checkpoints of several runs, and nothing says which is the last.
    """
    run, found = Run.load(folder), checkpoints_in(folder, run_of)
    if run is None:
        if len(set(found.values())) > 1:
            names = listed([p.name for p in found], 3)
            raise CheckpointError(
                f"{folder} holds {names} of several runs and no {RUN} that says which is the last; "
                "give resume_from_checkpoint the path of one"
            )
        return max(found, key=step_of, default=None)
    own = [path for path, run_id in found.items() if run_id == run.id]
    if not own and run.begun_from is not None:
        return Path(run.begun_from)
    return max(own, key=step_of, default=None)


def begin_run(folder: Path, path: Path | None, run_of: RunOf) -> str:
    """Note which run trains into ``folder`` from now on, and say which checkpoints are not its own.

    Args:
        folder: Locked.
        path: The checkpoint from which it goes on; ``None``: it begins afresh. A run that goes
            back behind checkpoints of its own is another one from there on.
        run_of: Returns the identity of a checkpoint.

    Returns:
        Its identity.
    """
    found = checkpoints_in(folder, run_of)
    run, before, behind = Run(uuid.uuid4().hex), None, list[str]()
    if path is not None:
        before, path = run_of(path), path.absolute()
        behind = [p.name for p, r in found.items() if r == before and step_of(p) > step_of(path)]
        goes_on = bool(before) and not behind
        inside = goes_on and path.parent == folder.absolute()
        run = Run(str(before) if goes_on else run.id, None if inside else str(path))
    write_json(folder / RUN, to_json(run))
    past = (run.id, before or run.id)  # what led to the checkpoint is its own
    others = [p.name for p, r in found.items() if r not in past or p.name in behind]
    if others:
        # transformers' own rule, which the thin loop does not have.
        all_count = run_of is run_of_trainer_checkpoint
        logger.warning(
            "%s holds %s of %s: this one does not resume them, and replaces those of its own steps"
            "%s",
            folder,
            listed(others, 3),
            f"the run that went on behind {path.name}" if path and behind else "another run",
            "; save_total_limit counts them" if all_count else "",
        )
    return run.id


@contextlib.contextmanager
def trainer_run(
    folder: Path, *, resume_from_checkpoint: str | bool | None, saves: bool
) -> Iterator[tuple[str | None, str]]:
    """Have ``folder`` for one call of ``train`` of transformers' trainer, if that saves there.

    Yields:
        The checkpoint that it goes on from, and its identity; "" while nothing is saved.

    Raises:
        CheckpointError: Another process trains into the folder.
        ValueError: There is no checkpoint to resume.
    """
    path: Path | None = None
    run_id = ""
    with locked(folder) if saves else contextlib.nullcontext():
        if resume_from_checkpoint is True:
            path = newest_checkpoint(folder, run_of_trainer_checkpoint)
            if path is None:
                raise ValueError(
                    f"there is no complete checkpoint of the last run in {folder}; name one, "
                    "or start afresh without resume_from_checkpoint"
                )
        elif resume_from_checkpoint:
            path = Path(str(resume_from_checkpoint))
        if saves and (path is None or run_of_trainer_checkpoint(path) is not None):
            run_id = begin_run(folder, path, run_of_trainer_checkpoint)
        yield None if path is None else str(path), run_id


def begin_trainer_checkpoint(path: Path, run_id: str) -> None:
    """Say of which run a checkpoint of transformers' trainer is that is written from now on."""
    path.mkdir(parents=True, exist_ok=True)
    (path / _TRAINER_STATE).unlink(missing_ok=True)  # written last: then it is complete
    write_json(path / RUN, {"id": run_id})


def run_of_trainer_checkpoint(path: Path) -> str | None:
    """Return the identity in a checkpoint of transformers' trainer, as :data:`RunOf` says.

    Raises:
        CheckpointError: What is there cannot be read, so that it may well be complete.
    """
    with readable(path):
        try:
            TrainerState(**read_settings(path / _TRAINER_STATE))
        except (CheckpointError, FileNotFoundError, NotADirectoryError, TypeError):
            return None
    run = Run.load(path)
    return "" if run is None else run.id


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, by its name; -1 if that does not say."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _holder(folder: Path) -> str:
    """Say which process has the lock of ``folder``."""
    try:
        pid, host, *_ = (folder / LOCK).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return "another process"
    return f"process {pid} on {host}"
