"""What one process writes: its tensors, in files of its own that are numbered if there are several.

One process writes ``model.safetensors``, the second of four ``model-00002-of-00004.safetensors``;
``from_pretrained`` reads either, the latter through its index file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ipu_pipeline.checkpoint.directory import flush
from ipu_pipeline.checkpoint.manifest import describe

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Part:
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


@dataclass(frozen=True)
class Written:
    """What one process has written.

    Attributes:
        files: Size and checksum by name.
        names: Of the tensors, by file.
        num_bytes: Of the tensors, by file.
        values: Those of the part.
    """

    files: Mapping[str, Mapping[str, Any]]
    names: Mapping[str, tuple[str, ...]]
    num_bytes: Mapping[str, int]
    values: Mapping[str, Mapping[str, Any]]


def on_host(tensors: Mapping[str, Tensor], *, copy: bool) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, each in memory of its own.

    Args:
        tensors: Any.
        copy: Whether they may be changed afterwards.
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


def write_part(folder: Path, part: Part, index: int = 0, count: int = 1) -> Written:
    """Write and flush the files of one process, the ``index``-th of ``count``.

    Raises:
        OSError: The disk is full, or not writable.
    """
    files: dict[str, Mapping[str, Any]] = {}
    tensors_of = {file_name(s, index, count): t for s, t in part.tensors.items() if t}
    for name, tensors in tensors_of.items():
        try:
            save_file(dict(tensors), folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            # safetensors reports a full disk in its own type.
            raise OSError(f"could not write {folder / name}: {error}") from error
        flush(folder / name)
        files[name] = describe(folder / name)
    return Written(
        files,
        names={name: tuple(tensors) for name, tensors in tensors_of.items()},
        num_bytes={n: sum(t.nbytes for t in found.values()) for n, found in tensors_of.items()},
        values=part.values,
    )


def file_name(stem: str, index: int, count: int) -> str:
    """Return the name of the file of one of ``count`` processes."""
    return f"{stem}{_SUFFIX}" if count == 1 else f"{stem}-{index + 1:05}-of-{count:05}{_SUFFIX}"


def files_of(stem: str, files: Iterable[str]) -> list[str]:
    """Return those of ``files`` that hold the tensors of ``stem``."""
    pattern = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?" + re.escape(_SUFFIX))
    return sorted(name for name in files if pattern.fullmatch(name))
