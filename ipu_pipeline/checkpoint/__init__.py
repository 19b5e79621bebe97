"""Checkpoints: weights, optimizer, step and random state, in safetensors and JSON only.

::

    checkpoint-100/
    |-- model.safetensors       loadable with from_pretrained; of tied tensors one. Where several
    |                           processes write, each has its own file, and there is an index
    |-- config.json, ...        what save_pretrained adds (transformers models)
    |-- optimizer.safetensors   state tensors, "exp_avg/encoder.layer.0.weight"; the same
    |-- optimizer.json          groups by parameter name, with their settings
    `-- checkpoint.json         versions, model fingerprint, step, random state, checksums, extra,
                                what modules' get_extra_state returns

The folder appears whole or not at all, and nothing is loaded before everything was checked.
Parameters go by their names in the unsplit model, so any split, target and grouping of the
optimizer's parameters loads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ipu_pipeline.checkpoint.directory import (
    remove_abandoned,
    remove_directory,
    restore_previous,
)
from ipu_pipeline.checkpoint.manifest import (
    MANIFEST,
    UNREADABLE,
    check_files,
    parsed_rng_state,
    read_manifest,
    readable,
)
from ipu_pipeline.checkpoint.optimizer_state import load_optimizer, read_optimizer
from ipu_pipeline.checkpoint.slices import UNCUT, Slices
from ipu_pipeline.checkpoint.weights import (
    check_extra_state,
    check_fingerprint,
    read_weights,
    warn_of_other_settings,
)
from ipu_pipeline.checkpoint.writer import Attach, Background, write_checkpoint
from ipu_pipeline.errors import CheckpointError, shown
from ipu_pipeline.ops.master_weights import MasterWeights

__all__ = [
    "MANIFEST",
    "Attach",
    "Background",
    "CheckpointInfo",
    "check_share",
    "is_complete",
    "prepare_loading",
    "read_checkpoint",
    "read_extra",
    "remove_abandoned",
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
        loss_scaling: State of the ``GradScaler`` that it was written with; empty without one.
    """

    global_step: int
    extra: dict[str, Any]
    loss_scaling: Mapping[str, float]


def read_checkpoint(
    path: str | Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    masters: MasterWeights | None = None,
) -> CheckpointInfo:
    """Load a checkpoint into ``model`` and ``optimizer``, in place; set the global random states.

    Everything is read and checked first: after an error both are as they were. A replacement of
    ``path`` that was cut off is finished.

    Args:
        path: The checkpoint's folder.
        model: The same model; its own parameters are filled, under any split.
        optimizer: The same kind of optimizer, grouped in any way; ``None`` to leave it out.
        masters: Of the optimizer, if float32 copies of weights are stepped.

    Raises:
        CheckpointError: The checkpoint is damaged, incomplete, newer, or of another model; or it
            has float32 copies of weights, and ``masters`` are not given.
    """
    with readable(Path(path)):
        restore_previous(Path(path))
    check_share(path)
    return prepare_loading(path, model=model, optimizer=optimizer, masters=masters)()


def check_share(path: str | Path, index: int = 0, count: int = 1) -> None:
    """Check the manifest, that all files are there, and the checksums of a share of them.

    Args:
        path: The checkpoint's folder.
        index: Which share.
        count: Number of shares, about equal in bytes; together they are all files.

    Raises:
        CheckpointError: The checkpoint is damaged, incomplete or newer.
    """
    path = Path(path)
    with readable(path):
        manifest = read_manifest(path)
        check_files(path, manifest, checksums=False)
        files = manifest["files"]
        own = sorted(files, key=lambda name: (-files[name]["size"], name))[index::count]
        check_files(path, {"files": {name: files[name] for name in own}})


def prepare_loading(
    path: str | Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    is_held: Callable[[str], bool] = lambda _: True,
    slices: Slices = UNCUT,
    masters: MasterWeights | None = None,
) -> Callable[[], CheckpointInfo]:
    """Read a checkpoint whose checksums are checked; return what puts it into the model.

    Of the tensors of the state dict, those are read that are held here (``is_held``, by name), and
    of each the slice that is here. The other arguments and the errors are those of
    :func:`read_checkpoint`.
    """
    path = Path(path)
    with readable(path):
        manifest = read_manifest(path)
        check_fingerprint(manifest["model"], model, path, slices)
        tensors = read_weights(model, path, manifest["files"], is_held, slices)
        state = None
        if optimizer is not None:
            state = read_optimizer(optimizer, model, path, manifest["files"], is_held, slices)
        own = dict(manifest.get("extra_state", {}))
        check_extra_state(own, model)
        set_rng_state = parsed_rng_state(manifest["rng"])
        scaling = _scaling(manifest.get("loss_scaling", {}))
        found = CheckpointInfo(manifest["global_step"], dict(manifest["extra"]), scaling)
        if type(found.global_step) is not int or not 0 <= found.global_step < 2**62:
            raise ValueError(f"global_step is {shown(found.global_step)}")
        warn_of_other_settings(model, path)

    def apply() -> CheckpointInfo:
        if optimizer is not None and state is not None:
            load_optimizer(optimizer, state, path, masters)
        model.load_state_dict({**tensors, **own}, strict=False)
        set_rng_state()
        return found

    return apply


def _scaling(saved: Mapping[str, Any]) -> dict[str, float]:
    """Return the state of a ``GradScaler``, checked; empty if there is none."""
    known = torch.amp.GradScaler("cpu").state_dict()
    wrong = saved.keys() ^ known.keys() if saved else ()
    for name, value in saved.items():
        least = 0.0 if name.startswith("_") else math.ulp(0.0)
        if wrong or type(value) not in (int, float) or not least <= value < math.inf:
            raise ValueError(f"loss_scaling has {name}: {shown(value)}")
    return {name: type(known[name])(value) for name, value in saved.items()}


def is_complete(path: str | Path) -> bool:
    """Whether ``path`` is a checkpoint with every file in its full size (checksums not read)."""
    return read_extra(path) is not None


def read_extra(path: str | Path) -> dict[str, Any] | None:
    """Return the JSON data that the writer of a complete checkpoint added; else ``None``.

    Raises:
        CheckpointError: What is there cannot be read, so that it may well be complete.
    """
    path = Path(path)
    with readable(path):
        try:
            manifest = read_manifest(path)
            check_files(path, manifest, checksums=False)
            return dict(manifest["extra"])
        except (CheckpointError, FileNotFoundError, *UNREADABLE):
            return None
