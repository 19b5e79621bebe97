"""A checkpoint on its way: begun by the caller, finished by whoever has all its parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ipu_pipeline.checkpoint.directory import NewDirectory
from ipu_pipeline.checkpoint.manifest import as_json_data, check_files, write_manifest
from ipu_pipeline.checkpoint.optimizer_state import (
    OPTIMIZER,
    SETTINGS,
    optimizer_settings,
    optimizer_state,
    tensor_key,
)
from ipu_pipeline.checkpoint.parts import Part, Written, files_of, on_host
from ipu_pipeline.checkpoint.rng import rng_state
from ipu_pipeline.checkpoint.weights import (
    LEFT_OUT,
    WEIGHTS,
    fingerprint,
    save_settings,
    weights_to_save,
)

# What from_pretrained looks for where the weights are in several files.
WEIGHTS_INDEX = "model.safetensors.index.json"
Attach = Callable[[Path], None]


class NewCheckpoint:
    """Everything of a checkpoint but tensors, as it is now, in a hidden folder.

    Args:
        path: The checkpoint's folder.
        model: The unsplit model.
        optimizer: ``None`` to leave it out.
        groups: All groups of the optimizer with all parameters, if it has a part of them now.
        global_step: Optimizer steps tried so far.
        extra: JSON data to keep with it.
        attach: Called with the hidden folder; what it adds may be changed later without damage.

    Attributes:
        folder: Where the parts are to be written.

    Raises:
        CheckpointError: Something cannot be written as JSON.
        OSError: The disk is full, or not writable.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        global_step: int,
        extra: Mapping[str, Any] | None = None,
        attach: Attach | None = None,
    ) -> None:
        self._content = as_json_data(
            {
                "model": fingerprint(model),
                "global_step": global_step,
                "rng": rng_state(),
                "extra": dict(extra or {}),
            }
        )
        self._settings: dict[str, Any] | None = None
        if optimizer is not None:
            self._settings = optimizer_settings(optimizer, model, groups)
        self._directory = NewDirectory(Path(path))
        self.folder = self._directory.folder
        try:
            self._attached = self._attach(attach)
            save_settings(model, self.folder)
        except BaseException:
            self.discard()
            raise

    def finish(self, parts: Sequence[Written]) -> Path:
        """Publish the checkpoint; every part is written.

        Raises:
            OSError: The disk is full. Earlier checkpoints are untouched.
            CheckpointError: A file that somebody wrote is not there.
        """
        try:
            files = {name: entry for part in parts for name, entry in part.files.items()}
            check_files(self.folder, {"files": files}, checksums=False)
            self._write_weights_index(parts)
            if self._settings is not None:
                values = {name: v for part in parts for name, v in part.values.items()}
                self._write_json(SETTINGS, self._settings | {"values": values})
            write_manifest(self.folder, self._content, files, self._attached)
        except BaseException:
            self.discard()
            raise
        self._directory.publish()
        return self._directory.path

    def discard(self) -> None:
        """Leave nothing behind; does nothing once the checkpoint is published."""
        self._directory.discard()

    def _attach(self, attach: Attach | None) -> frozenset[str]:
        if attach is not None:
            attach(self.folder)
        return frozenset(item.name for item in self.folder.iterdir())

    def _write_weights_index(self, parts: Sequence[Written]) -> None:
        files = files_of(WEIGHTS, [file for part in parts for file in part.names])
        if len(files) < 2:
            return
        own = [(part, file) for part in parts for file in part.names if file in files]
        places = {name: file for part, file in own for name in part.names[file]}
        total = sum(part.num_bytes[file] for part, file in own)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        self._write_json(WEIGHTS_INDEX, content)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def take_part(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    copy: bool,
    weights: Callable[[torch.Tensor], bool] = lambda _: True,
    states: Callable[[str], bool] = lambda _: True,
) -> Part:
    """Return the tensors that this process is to write.

    Args:
        model: The unsplit model.
        optimizer: ``None`` to leave it out.
        copy: Whether training goes on before they are written.
        weights: Whether this process writes a parameter or buffer.
        states: Whether it writes the optimizer's state of a parameter, by name.
    """
    kept, left_out = weights_to_save(model)
    tensors = {
        WEIGHTS: {name: t for name, t in kept.items() if weights(t)},
        LEFT_OUT: {name: t for name, t in left_out.items() if weights(t)},
    }
    values: dict[str, dict[str, Any]] = {}
    if optimizer is not None:
        state, values = optimizer_state(optimizer, model)
        values = {name: v for name, v in values.items() if states(name)}
        tensors[OPTIMIZER] = {
            tensor_key(name, key): tensor
            for name, found in state.items()
            if states(name)
            for key, tensor in found.items()
        }
    return Part({stem: on_host(found, copy=copy) for stem, found in tensors.items()}, values)
