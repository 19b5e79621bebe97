"""Measurements on disk, by a fingerprint of what was measured and of the machine."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path

import torch
from filelock import FileLock

from ipu_pipeline.ops import extension, linear

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


def load_measurements(name: str) -> dict[str, list[float]]:
    """Return the measurements kept under ``name``; without those that are damaged, if any."""
    try:
        content = json.loads(_file(name).read_text(encoding="utf-8"))
        if content.get("machine") != machine_key():
            return {}
        values = {key: [float(v) for v in found] for key, found in content["values"].items()}
        valid = {
            k: found and all(isfinite(v) and v >= 0 for v in found) for k, found in values.items()
        }
        return {key: found for key, found in values.items() if valid[key]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def store_measurements(name: str, values: Mapping[str, list[float]]) -> None:
    """Keep measurements under ``name``; a folder that cannot be written is no error."""
    path = _file(name)
    content = {"machine": machine_key(), "values": dict(values)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)
    except OSError:
        return


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
