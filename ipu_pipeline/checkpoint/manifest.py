"""``checkpoint.json``: what a checkpoint holds, its checksums, and the global random states."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ipu_pipeline.errors import CheckpointError, first_line, shown
from ipu_pipeline.ir.codec import parse_json
from ipu_pipeline.ir.files import named, read_text
from ipu_pipeline.ir.plan import library_versions

MANIFEST = "checkpoint.json"
# 2: tensors may be spread over several files.
SCHEMA_VERSION = 2
_SUFFIX = ".safetensors"
# What comes of reading a file that is not what its name says.
UNREADABLE = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError,
    SafetensorError,
)  # fmt: skip


def write_manifest(
    folder: Path,
    content: Mapping[str, Any],
    described: Mapping[str, Mapping[str, Any]] | None = None,
    unlisted: Collection[str] = (),
) -> None:
    """Write ``content`` with versions and the size and SHA-256 of every file in ``folder``.

    Args:
        folder: The checkpoint.
        content: JSON data.
        described: Files that :func:`describe` was asked about by whoever wrote them.
        unlisted: Files and folders that may be changed later without damage.
    """
    files = {name: dict(entry) for name, entry in (described or {}).items()}
    for item in folder.iterdir():
        if item.name not in files and item.name not in unlisted:
            files[item.name] = describe(item)
    body = {
        "schema_version": SCHEMA_VERSION,
        "library_version": library_versions()["ipu-pipeline"],
        **content,
        "files": dict(sorted(files.items())),
    }
    text = json.dumps(body | {"sha256": _digest(body)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def as_json_data(content: Mapping[str, Any], refusal: str) -> dict[str, Any]:
    """Return a copy of ``content``, as it will be read.

    Raises:
        CheckpointError: It is not JSON data that :func:`read_settings` takes: ``refusal``, with
            what is wrong in its braces.
    """
    try:
        copied: dict[str, Any] = parse_json(json.dumps(content), any_number=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(refusal.format(first_line(error))) from error
    return copied


def read_settings(path: Path) -> Any:
    """Return what a JSON file of a checkpoint holds; its numbers may be NaN and infinite.

    Raises:
        CheckpointError: It holds no such data.
        OSError: It cannot be read.
    """
    try:
        return parse_json(read_text(path, "the file", CheckpointError), any_number=True)
    except (CheckpointError, ValueError) as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise damaged(path.parent, f"{path.name} cannot be read ({error})") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of ``folder`` after checking it; the files are not read.

    Raises:
        CheckpointError: There is none, it is damaged, or a newer library wrote it.
        OSError: It cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: {MANIFEST} is not there; give the folder of "
            "a checkpoint that ipu_pipeline wrote"
        )
    body = read_settings(path)
    try:
        digest = body.pop("sha256")
        schema = body["schema_version"]
        if type(schema) is not int or schema < 1:
            raise ValueError(f"schema_version is {shown(schema)}")
    except UNREADABLE as error:
        raise damaged(folder, f"{MANIFEST} cannot be read ({error})") from error
    if schema > SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint schema {schema} (written by ipu-pipeline "
            f"{body.get('library_version')}), this version reads up to {SCHEMA_VERSION}; "
            "update ipu-pipeline"
        )
    if _digest(body) != digest:
        raise damaged(folder, f"{MANIFEST} does not match its own checksum")
    return body


def check_files(folder: Path, manifest: Mapping[str, Any], *, checksums: bool = True) -> None:
    """Check that every file listed is there, with its size and (optionally) its checksum.

    Raises:
        CheckpointError: Names the first file that is missing, truncated or altered.
    """
    for name, saved in manifest["files"].items():
        if Path(name).name != name:
            raise damaged(folder, f"it lists {name!r}, which is no file in it")
        path = folder / name
        if not path.is_file():
            raise damaged(folder, f"{name} is missing")
        size = path.stat().st_size
        if size != saved["size"]:
            raise damaged(folder, f"{name} has {size} bytes instead of {saved['size']}")
        if checksums and _sha256(path) != saved["sha256"]:
            raise damaged(folder, f"{name} does not match its checksum")


def damaged(folder: Path, what: str) -> CheckpointError:
    """Return the error for a checkpoint that is not as it was written."""
    return CheckpointError(
        f"{folder} is damaged: {what}; load an earlier checkpoint or copy this one again"
    )


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn what comes of reading a checkpoint into an error of ours that names it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot read {named(error.filename or folder)}: {error.strerror or error}; change its "
            "permissions, or copy the checkpoint again"
        ) from error
    except UNREADABLE as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from error


def describe(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the SHA-256 of a file."""
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        # hashlib.file_digest does the same from Python 3.11 on.
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def file_name(stem: str, index: int, count: int) -> str:
    """Return the name of the file of one of ``count`` processes."""
    return f"{stem}{_SUFFIX}" if count == 1 else f"{stem}-{index + 1:05}-of-{count:05}{_SUFFIX}"


def files_of(stem: str, files: Iterable[str]) -> list[str]:
    """Return those of ``files`` that hold the tensors of ``stem``."""
    pattern = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?" + re.escape(_SUFFIX))
    return sorted(name for name in files if pattern.fullmatch(name))


def tensor_bytes(path: Path) -> dict[str, int]:
    """Return the bytes of every tensor in a safetensors file; what it maps is not read."""
    return {name: tensor.nbytes for name, tensor in load_file(path).items()}


def rng_state() -> dict[str, Any]:
    """Return the three states as JSON data."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    version, internal, gauss = random.getstate()
    return {
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def parsed_rng_state(state: Mapping[str, Any]) -> Callable[[], None]:
    """Return what sets the three states to those of :func:`rng_state`; they are checked now.

    Raises:
        ValueError, TypeError, KeyError: They are no such states.
    """
    data = np.frombuffer(base64.b64decode(state["torch"], validate=True), dtype=np.uint8)
    of_torch = torch.from_numpy(data.copy())
    try:
        torch.Generator().set_state(of_torch)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    name, keys, position, has_gauss, cached = state["numpy"]
    if type(position) is not int or not 0 <= position <= len(keys):  # numpy reads there unchecked
        raise ValueError(f"numpy's random state stands at {shown(position)}")
    of_numpy = (name, np.array(keys, np.uint32), position, has_gauss, cached)
    np.random.RandomState().set_state(of_numpy)
    version, internal, gauss = state["python"]
    of_python = (version, tuple(internal), gauss)
    random.Random().setstate(of_python)

    def apply() -> None:
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)

    return apply
