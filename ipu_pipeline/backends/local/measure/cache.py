"""Measurements on disk, by a fingerprint of what was measured and of the machine."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from filelock import FileLock

from ipu_pipeline.ir.codec import to_json, write_json
from ipu_pipeline.ops import extension, linear

T = TypeVar("T")
METHOD = 4  # of measuring: what an older one has found is measured again
CACHE_VARIABLE = "IPU_PIPELINE_CACHE"


def cache_folder() -> Path:
    """Return the folder for measurements: ``$IPU_PIPELINE_CACHE``, or one in the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
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
    """Return what is kept under ``name``, checked to be of a ``kind``; None if it is not usable."""
    try:
        content = msgspec.json.decode(_file(name).read_bytes(), type=dict[str, msgspec.Raw])
        if msgspec.json.decode(content["machine"]) != machine_key():
            return None
        return msgspec.json.decode(content["values"], type=kind)
    except (OSError, msgspec.MsgspecError, KeyError):
        return None


def store_measurements(name: str, values: Any) -> None:
    """Keep measurements under ``name``; a folder that cannot be written is no error."""
    path = _file(name)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"machine": machine_key(), "values": to_json(values)}, "values")


@contextlib.contextmanager
def one_process(name: str) -> Iterator[None]:
    """Let one process at a time measure ``name``: ranks that plan at once must find the same."""
    lock = FileLock(cache_folder() / f".{name}.lock")
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:  # nothing can be kept there either
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _file(name: str) -> Path:
    return cache_folder() / f"{name}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
