"""``checkpoint.json``: what a checkpoint holds, and the checksums that prove it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ipu_pipeline.errors import CheckpointError

MANIFEST = "checkpoint.json"
SCHEMA_VERSION = 1


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` with versions and the size and SHA-256 of every file in ``folder``.

    Raises:
        CheckpointError: ``content`` is not JSON data.
    """
    body = {
        "schema_version": SCHEMA_VERSION,
        "library_version": _library_version(),
        **content,
        "files": {item.name: _describe(item) for item in sorted(folder.iterdir())},
    }
    try:
        digest = _digest(body)
    except TypeError as error:
        raise CheckpointError(
            f"extra must be JSON data ({error}); convert tensors and arrays to numbers or lists"
        ) from error
    text = json.dumps(body | {"sha256": digest}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of ``folder`` after checking it; the files are not read.

    Raises:
        CheckpointError: There is none, it is damaged, or a newer library wrote it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: {MANIFEST} is not there; give the folder of "
            "a checkpoint that ipu_pipeline wrote"
        )
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        digest = body.pop("sha256")
        schema = int(body["schema_version"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({error})") from error
    if schema > SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint schema {schema} (written by ipu-pipeline "
            f"{body.get('library_version')}), this version reads up to {SCHEMA_VERSION}; "
            "update ipu-pipeline"
        )
    if _digest(body) != digest:
        raise _damaged(folder, f"{MANIFEST} does not match its own checksum")
    return body


def check_files(folder: Path, manifest: Mapping[str, Any], *, checksums: bool = True) -> None:
    """Check that every file listed is there, with its size and (optionally) its checksum.

    Raises:
        CheckpointError: Names the first file that is missing, truncated or altered.
    """
    for name, saved in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        size = path.stat().st_size
        if size != saved["size"]:
            raise _damaged(folder, f"{name} has {size} bytes instead of {saved['size']}")
        if checksums and _sha256(path) != saved["sha256"]:
            raise _damaged(folder, f"{name} does not match its checksum")


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is damaged: {what}; load an earlier checkpoint or copy this one again"
    )


def _describe(path: Path) -> dict[str, Any]:
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


def _library_version() -> str:
    try:
        return version("ipu-pipeline")
    except PackageNotFoundError:
        return "unknown"
