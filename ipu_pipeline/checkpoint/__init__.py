"""Checkpoints: weights, optimizer, step and random state, in safetensors and JSON only.

::

    checkpoint-100/
    |-- model.safetensors       loadable with from_pretrained; of tied tensors one. Where several
    |                           processes write, each has its own file, and there is an index
    |-- config.json, ...        what save_pretrained adds (transformers models)
    |-- optimizer.safetensors   state tensors, "exp_avg/encoder.layer.0.weight"; the same
    |-- optimizer.json          groups by parameter name, with their settings
    `-- checkpoint.json         versions, model fingerprint, step, random state, checksums, extra

The folder appears whole or not at all, and nothing is loaded before everything was checked.
Parameters go by their names in the unsplit model, so any split, target and grouping of the
optimizer's parameters loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ipu_pipeline.checkpoint.background import Background
from ipu_pipeline.checkpoint.directory import remove_directory, restore_previous
from ipu_pipeline.checkpoint.manifest import MANIFEST, check_files, read_manifest
from ipu_pipeline.checkpoint.new import Attach, NewCheckpoint, take_part
from ipu_pipeline.checkpoint.optimizer_state import read_optimizer
from ipu_pipeline.checkpoint.parts import Part, write_part
from ipu_pipeline.checkpoint.rng import set_rng_state
from ipu_pipeline.checkpoint.weights import (
    check_fingerprint,
    load_weights,
    read_weights,
    warn_of_other_settings,
)
from ipu_pipeline.errors import CheckpointError

__all__ = [
    "MANIFEST",
    "Attach",
    "Background",
    "CheckpointInfo",
    "is_complete",
    "read_checkpoint",
    "remove_directory",
    "restore_previous",
    "write_checkpoint",
]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds besides tensors.

    Attributes:
        global_step: Optimizer steps tried when it was written.
        extra: The JSON data that the writer added.
        library_version: ipu-pipeline's version that wrote it.
    """

    global_step: int
    extra: dict[str, Any]
    library_version: str = "unknown"


def write_checkpoint(
    path: str | Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    global_step: int,
    extra: Mapping[str, Any] | None = None,
    attach: Attach | None = None,
    background: Background | None = None,
) -> Path:
    """Write a checkpoint atomically; one already at ``path`` is replaced.

    Args:
        path: The checkpoint's folder.
        model: The unsplit model. With the files of its ``save_pretrained`` if it has one.
        optimizer: Over the model's own parameters; ``None`` to leave it out.
        global_step: Optimizer steps tried so far.
        extra: JSON data to keep with it.
        attach: Called at once with the folder that becomes the checkpoint, to add files to it.
        background: Copy everything, and write it there.

    Returns:
        ``path``.

    Raises:
        CheckpointError: Something cannot be written as safetensors or JSON.
        OSError: The disk is full, or not writable. Earlier checkpoints are untouched.
    """
    new = NewCheckpoint(
        path,
        model=model,
        optimizer=optimizer,
        global_step=global_step,
        extra=extra,
        attach=attach,
    )
    try:
        part = take_part(model, optimizer, copy=background is not None)
    except BaseException:
        new.discard()
        raise
    if background is None:
        _write(new, part)
    else:
        background.start(lambda: _write(new, part))
    return Path(path)


def _write(new: NewCheckpoint, part: Part) -> None:
    try:
        written = write_part(new.folder, part)
    except BaseException:
        new.discard()
        raise
    new.finish([written])


def read_checkpoint(
    path: str | Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    restore_rng: bool = True,
    repair: bool = True,
) -> CheckpointInfo:
    """Load a checkpoint into ``model`` and ``optimizer``, in place.

    Everything is read and checked first: after an error both are as they were.

    Args:
        path: The checkpoint's folder.
        model: The same model; its own parameters are filled, under any split.
        optimizer: The same kind of optimizer, grouped in any way; ``None`` to leave it out.
        restore_rng: Set the global random states as well.
        repair: Finish a replacement of ``path`` that was cut off; for one process only.

    Raises:
        CheckpointError: The checkpoint is damaged, incomplete, newer, or of another model.
    """
    path = Path(path)
    if repair:
        restore_previous(path)
    manifest = read_manifest(path)
    check_fingerprint(manifest["model"], model, path)
    check_files(path, manifest)
    tensors = read_weights(model, path, manifest["files"])
    state = None
    if optimizer is not None:
        state = read_optimizer(optimizer, model, path, manifest["files"])
    warn_of_other_settings(model, path)
    load_weights(model, tensors)
    if optimizer is not None and state is not None:
        optimizer.load_state_dict(state)
    if restore_rng:
        set_rng_state(manifest["rng"])
    return CheckpointInfo(manifest["global_step"], manifest["extra"], manifest["library_version"])


def is_complete(path: str | Path) -> bool:
    """Whether ``path`` is a checkpoint with every file in its full size (checksums not read)."""
    path = Path(path)
    try:
        check_files(path, read_manifest(path), checksums=False)
    except CheckpointError:
        return False
    return True
