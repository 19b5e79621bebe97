"""Measurements on disk, by a fingerprint of what was measured and of the machine."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from filelock import FileLock

from ipu_pipeline.errors import ConfigError, OutputError, first_line
from ipu_pipeline.ir.files import named, read_text, write_bytes
from ipu_pipeline.ops import extension, linear

T = TypeVar("T")
METHOD = 4  # of measuring: what an older one has found is measured again
CACHE_VARIABLE = "IPU_PIPELINE_CACHE"
logger = logging.getLogger(__name__)


class _Entry(msgspec.Struct):
    """A file of the cache: whose measurements, what they are, and the checksum of both."""

    machine: str
    values: msgspec.Raw
    sha256: str


def cache_folder() -> Path:
    """Return the folder for measurements: ``$IPU_PIPELINE_CACHE``, or one in the user's cache.

    Raises:
        PermissionError: The user has no home folder.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # of a user whom the system does not know
        raise PermissionError(str(error)) from error
    return Path(base) / "ipu_pipeline"


def machine_key() -> str:
    """Return text that names this machine's speed: processor, cores, torch, what runs products."""
    cores = len(os.sched_getaffinity(0))
    kernels = "kernels" if extension.state().usable else "no kernels"
    products = os.environ.get(linear.SWITCH, "")
    return (
        f"{_processor()}|{cores} cores|torch {torch.__version__}|{kernels}|products {products}|"
        f"method {METHOD}"
    )


def load_measurements(name: str, kind: type[T]) -> T | None:
    """Return what is kept under ``name``; None if there is nothing, or of another machine.

    A damaged entry is dropped with a log line: its checksum tells.
    """
    try:
        path = _file(name)
        if not path.exists():
            return None
        _make_folder()
        entry = msgspec.json.decode(read_text(path, "the measurements", ConfigError), type=_Entry)
        if entry.sha256 != _checksum(entry.machine, entry.values):
            raise ConfigError("its checksum is another one")
        if entry.machine != machine_key():
            return None
        return msgspec.json.decode(entry.values, type=kind)
    except PermissionError:
        return None
    except (ConfigError, msgspec.MsgspecError, RecursionError, OSError) as error:
        logger.warning("%s is damaged, so it is measured again: %s", named(path), first_line(error))
        return None


def store_measurements(name: str, values: Any) -> None:
    """Keep measurements under ``name``; a folder that cannot be written is no error."""
    kept = msgspec.Raw(msgspec.json.encode(values))
    entry = _Entry(machine_key(), kept, _checksum(machine_key(), kept))
    with contextlib.suppress(OSError, OutputError):
        _make_folder()
        write_bytes(_file(name), msgspec.json.encode(entry) + b"\n")


def _checksum(machine: str, values: msgspec.Raw) -> str:
    return hashlib.sha256(machine.encode() + b"\n" + bytes(values)).hexdigest()


@contextlib.contextmanager
def one_process(name: str) -> Iterator[None]:
    """Let one process at a time measure ``name``: ranks that plan at once must find the same."""
    try:
        lock = FileLock(cache_folder() / f".{name}.lock")
        _make_folder()
        lock.acquire()
    except OSError:  # nothing can be kept there either
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _make_folder() -> None:
    """Make the folder; what is measured on this machine is its user's.

    Raises:
        PermissionError: It is another user's, or others can write there: what it holds, or where
            its links lead to, is not to be trusted.
    """
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        logger.warning(
            "measurements are not kept: others can write to %s; make it private (chmod 700), or "
            "name another folder in %s", named(folder), CACHE_VARIABLE,
        )  # fmt: skip
        raise PermissionError(f"{folder} is not private")


def _file(name: str) -> Path:
    return cache_folder() / f"{name}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
