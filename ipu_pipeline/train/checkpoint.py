"""The trainer's checkpoints: ``checkpoint-<step>`` folders, the newest one, rotation, resume."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ipu_pipeline.checkpoint import (
    MANIFEST,
    is_complete,
    remove_directory,
    restore_previous,
)
from ipu_pipeline.errors import CheckpointError
from ipu_pipeline.stages.executable import Executable
from ipu_pipeline.train.arguments import TrainingArguments
from ipu_pipeline.train.data import DataPosition, EpochBatches
from ipu_pipeline.train.results import LossMeter

logger = logging.getLogger(__name__)

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


@dataclass(frozen=True)
class TrainingPoint:
    """Where training is, besides weights, optimizer and random state. JSON data throughout.

    Attributes:
        position: The next batch.
        data: What the position counts in: samples, batch size, seed.
        scheduler: State of the learning-rate schedule.
        trainer_state: Transformers' trainer state, log history included.
        losses: Running losses.
    """

    position: DataPosition
    data: Mapping[str, int]
    scheduler: Mapping[str, Any]
    trainer_state: Mapping[str, Any]
    losses: LossMeter

    def to_json(self) -> dict[str, Any]:
        """Return it as the ``extra`` of a checkpoint."""
        return {"training": asdict(self)}

    @staticmethod
    def from_json(extra: Mapping[str, Any], path: Path) -> TrainingPoint:
        """Read the ``extra`` of a checkpoint.

        Raises:
            CheckpointError: The checkpoint was not written by ``train``.
        """
        try:
            saved = dict(extra["training"])
            position, losses = DataPosition(**saved["position"]), LossMeter(**saved["losses"])
            return TrainingPoint(**(saved | {"position": position, "losses": losses}))
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} was not written by train() of this version ({error!r}), so there is no "
                "data position to resume from; load it with executable.load_checkpoint and train "
                "without resume_from_checkpoint"
            ) from error


def checkpoint_path(output_dir: str | Path, global_step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{global_step}"


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


def rotate_checkpoints(
    output_dir: str | Path, limit: int | None, newest: Path, best: str | None = None
) -> None:
    """Delete the oldest complete checkpoints beyond ``limit``.

    Call it when ``newest`` is complete. ``newest`` and ``best`` always stay, so up to two remain
    under a limit of 1. Age is the time of writing, not the step: folders of an earlier run in
    ``output_dir`` go first.
    """
    if limit is None:
        return
    kept = {newest.resolve()} | ({Path(best).resolve()} if best else set())
    by_age = sorted(list_checkpoints(output_dir), key=lambda p: (_written_ns(p), _step(p)))
    others = [p for p in by_age if p.resolve() not in kept]
    present = len(by_age) - len(others)
    for path in others[: max(0, len(others) - max(0, limit - present))]:
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
        if arguments.should_save:
            restore_checkpoints(arguments.output_dir)
        found = find_resume_checkpoint(arguments)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    found, problem = executable.broadcast((found, problem))
    if problem:
        raise CheckpointError(problem)
    return found


def restore_checkpoints(output_dir: str | Path) -> None:
    """Finish or undo replacements of checkpoints that were cut off."""
    for item in Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.previous"):
        restore_previous(item.with_name(item.name.removeprefix(".").removesuffix(".previous")))


def find_resume_checkpoint(arguments: TrainingArguments) -> Path | None:
    """Return the checkpoint that ``resume_from_checkpoint`` asks for, ``None`` to start afresh.

    Raises:
        CheckpointError: The newest one is asked for and there is none.
    """
    wanted = arguments.resume_from_checkpoint
    if not wanted or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() not in ("auto", "latest", "true"):
        return Path(wanted)
    latest = latest_checkpoint(arguments.output_dir)
    if latest is None and str(wanted).lower() != "auto":
        raise CheckpointError(
            f"resume_from_checkpoint is {wanted!r} and {arguments.output_dir} holds no complete "
            "checkpoint; name one, or use 'auto' to start afresh when there is none"
        )
    return latest


def describe_data(sampler: EpochBatches) -> dict[str, int]:
    """Return what has to be the same for a data position to mean the same batch."""
    return {
        "num_samples": sampler.num_samples,
        "samples_per_epoch": sampler.num_used,
        "batch_size": sampler.batch_size,
        "seed": sampler.seed,
    }


def resume_position(
    point: TrainingPoint, data: Mapping[str, int], arguments: TrainingArguments, path: Path
) -> DataPosition:
    """Return where to go on in the data.

    Raises:
        CheckpointError: Data, batch size or seed differ from those of the checkpoint.
    """
    if arguments.ignore_data_skip:
        return DataPosition(point.position.epoch, 0)
    changed = [
        f"{name} was {point.data.get(name)} and is {value}"
        for name, value in data.items()
        if point.data.get(name) != value
    ]
    if changed:
        raise CheckpointError(
            f"{path} cannot be continued batch for batch: {', '.join(changed)}; restore them, or "
            "set ignore_data_skip to keep the weights and start the epoch over"
        )
    return point.position


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _written_ns(path: Path) -> int:
    return (path / MANIFEST).stat().st_mtime_ns
