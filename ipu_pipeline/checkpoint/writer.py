"""Writes a checkpoint: a hidden folder is begun, every process adds its shard, one publishes it.

A shard is the tensors of one process in files of its own, numbered if there are several: one
process writes ``model.safetensors``, the second of four ``model-00002-of-00004.safetensors``, and
``from_pretrained`` reads either, the latter through its index file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ipu_pipeline.checkpoint.directory import AtomicDirectory, flush
from ipu_pipeline.checkpoint.manifest import (
    as_json_data,
    check_files,
    describe,
    file_name,
    files_of,
    rng_state,
    tensor_bytes,
    write_manifest,
)
from ipu_pipeline.checkpoint.optimizer_state import (
    OPTIMIZER,
    SETTINGS,
    optimizer_settings,
    optimizer_state,
    tensor_key,
)
from ipu_pipeline.checkpoint.slices import UNCUT, Slices
from ipu_pipeline.checkpoint.weights import (
    LEFT_OUT,
    WEIGHTS,
    extra_state,
    fingerprint,
    save_settings,
    weights_to_save,
)

logger = logging.getLogger(__name__)

WEIGHTS_INDEX = "model.safetensors.index.json"
Attach = Callable[[Path], None]
# Size and checksum by name.
WrittenFiles = Mapping[str, Mapping[str, Any]]
_POLL_S = 0.1


@dataclass(frozen=True)
class Shard:
    """Tensors to write, on the CPU.

    Attributes:
        tensors: By the first part of the file's name, then by the tensor's name.
        values: Optimizer state that is no tensor, by parameter.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not any(self.tensors.values()) and not self.values


def on_host(tensors: Mapping[str, Tensor], *, copy: bool) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, each in memory of its own.

    ``copy``: whether they may be changed afterwards.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu", copy=copy).contiguous()
        # safetensors refuses memory that two tensors share.
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        found[name] = plain
    return found


def write_shard(folder: Path, shard: Shard, index: int = 0, count: int = 1) -> WrittenFiles:
    """Write and flush the files of one process, the ``index``-th of ``count``.

    Raises:
        OSError: The disk is full, or not writable.
    """
    files = {}
    for stem, tensors in shard.tensors.items():
        if not tensors:
            continue
        path = folder / file_name(stem, index, count)
        try:
            save_file(dict(tensors), path, metadata={"format": "pt"})
        except SafetensorError as error:
            # safetensors reports a full disk in its own type.
            raise OSError(f"could not write {path}: {error}") from error
        flush(path)
        files[path.name] = describe(path)
    return files


class CheckpointWriter:
    """Everything of a checkpoint but tensors, as it is now, in a hidden folder.

    Args:
        path: The checkpoint's folder.
        model: The unsplit model.
        optimizer: ``None`` to leave it out.
        groups: All groups of the optimizer with all parameters, if it has a part of them now.
        global_step: Optimizer steps tried so far.
        extra: JSON data to keep with it.
        loss_scaling: State of the ``GradScaler``, if there is one.
        attach: Called with the hidden folder; what it adds may be changed later without damage.
        slices: What of the model is here.

    Attributes:
        folder: Where the shards are to be written.

    Raises:
        CheckpointError: Something cannot be written as JSON.
        OSError: The disk is full, or not writable.
    """

    def __init__(  # noqa: PLR0913 - what a checkpoint keeps, by name
        self,
        path: str | Path,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        global_step: int,
        extra: Mapping[str, Any] | None = None,
        loss_scaling: Mapping[str, Any] | None = None,
        attach: Attach | None = None,
        slices: Slices = UNCUT,
    ) -> None:
        own = extra_state(model)
        self._content = as_json_data(
            {
                "model": fingerprint(model, slices),
                "global_step": global_step,
                "rng": rng_state(),
                "extra": dict(extra or {}),
                **({"extra_state": own} if own else {}),
                **({"loss_scaling": dict(loss_scaling)} if loss_scaling else {}),
            },
            "extra must be JSON data ({}); convert tensors and arrays to numbers or lists",
        )
        self._settings: dict[str, Any] | None = None
        if optimizer is not None:
            self._settings = optimizer_settings(optimizer, model, groups)
        self._directory = AtomicDirectory(Path(path))
        self.folder = self._directory.folder
        with self.or_nothing():
            if attach is not None:
                attach(self.folder)
            self._attached = frozenset(item.name for item in self.folder.iterdir())
            save_settings(model, self.folder)

    def finish(self, files: WrittenFiles, values: Mapping[str, Mapping[str, Any]]) -> Path:
        """Publish the checkpoint; every shard is written.

        Args:
            files: Those of all shards.
            values: Optimizer state that is no tensor, of all shards.

        Raises:
            OSError: The disk is full. Earlier checkpoints are untouched.
            CheckpointError: A file that somebody wrote is not there.
        """
        with self.or_nothing():
            check_files(self.folder, {"files": files}, checksums=False)
            self._write_weights_index(files_of(WEIGHTS, files))
            if self._settings is not None:
                self._write_json(SETTINGS, self._settings | {"values": values})
            write_manifest(self.folder, self._content, files, self._attached)
        self._directory.publish()
        return self._directory.path

    @contextlib.contextmanager
    def or_nothing(self) -> Iterator[None]:
        """Leave nothing behind if the block fails; changes nothing once it is published."""
        try:
            yield
        except BaseException:
            self._directory.discard()
            raise

    def _write_weights_index(self, files: Sequence[str]) -> None:
        if files == [file_name(WEIGHTS, 0, 1)]:
            return  # found by its name; one of several needs an index, even where others hold none
        sizes = {file: tensor_bytes(self.folder / file) for file in files}
        places = {name: file for file, found in sizes.items() for name in found}
        total = sum(sum(found.values()) for found in sizes.values())
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        self._write_json(WEIGHTS_INDEX, content)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def take_shard(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    copy: bool,
    weights: Callable[[torch.Tensor], bool] = lambda _: True,
    states: Callable[[str], bool] = lambda _: True,
    slices: Slices = UNCUT,
) -> Shard:
    """Return the tensors that this process is to write.

    ``weights`` says of a parameter or buffer whether it writes it, ``states`` of a parameter's
    name whether it writes the optimizer's state. ``copy``: training goes on before it does. Of
    ``slices`` the processes that share them write whole tensors, in turn; all of them call this.
    """
    kept, left_out = weights_to_save(model)
    found = [
        (stem, name, tensor, tensor)
        for stem, group in ((WEIGHTS, kept), (LEFT_OUT, left_out))
        for name, tensor in group.items()
        if weights(tensor)
    ]
    values: dict[str, dict[str, Any]] = {}
    if optimizer is not None:
        state, values = optimizer_state(optimizer, model)
        values = {name: v for name, v in values.items() if states(name)}
        parameters = dict(model.named_parameters())
        found += [
            (OPTIMIZER, tensor_key(name, key), parameters[name], tensor)
            for name, own in state.items()
            if states(name)
            for key, tensor in own.items()
        ]
    tensors: dict[str, dict[str, Tensor]] = {WEIGHTS: {}, LEFT_OUT: {}, OPTIMIZER: {}}
    for turn, (stem, name, parameter, part) in enumerate(found):
        whole = slices.whole(parameter, part)
        if turn % slices.size == slices.index and slices.writes(parameter):
            tensors[stem][name] = whole
    return Shard({stem: on_host(own, copy=copy) for stem, own in tensors.items()}, values)


class Background:
    """Writes checkpoints while training goes on.

    The thread is no daemon: a process that ends waits for it.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Run ``job``; the one before has to be waited for."""
        assert self._thread is None

        def run() -> None:
            try:
                job()
            except BaseException as error:
                logger.error("a checkpoint could not be written: %s", error)
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint-writer")
        self._thread.start()

    def wait(self, given_up: Callable[[], None] = lambda: None) -> None:
        """Wait until the job is done, if there is one.

        Args:
            given_up: Called again and again; may raise to wait no longer.

        Raises:
            BaseException: What the job raised; once.
        """
        if self._thread is not None:
            while self._thread.is_alive():
                given_up()
                self._thread.join(_POLL_S)
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def write_checkpoint(
    path: str | Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    global_step: int,
    extra: Mapping[str, Any] | None = None,
    loss_scaling: Mapping[str, Any] | None = None,
    attach: Attach | None = None,
    background: Background | None = None,
) -> Path:
    """Write a checkpoint atomically, in the ``background`` if there is one; return ``path``.

    One already at ``path`` is replaced. The others are those of :class:`CheckpointWriter`.

    Raises:
        CheckpointError: Something cannot be written as safetensors or JSON.
        OSError: The disk is full, or not writable. Earlier checkpoints are untouched.
    """
    new = CheckpointWriter(
        path,
        model=model,
        optimizer=optimizer,
        global_step=global_step,
        extra=extra,
        loss_scaling=loss_scaling,
        attach=attach,
    )
    with new.or_nothing():
        shard = take_shard(model, optimizer, copy=background is not None)
    if background is None:
        _write(new, shard)
    else:
        background.start(lambda: _write(new, shard))
    return Path(path)


def _write(new: CheckpointWriter, shard: Shard) -> None:
    with new.or_nothing():
        files = write_shard(new.folder, shard)
    new.finish(files, shard.values)
