from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ops import extension
from ipu_pipeline.ops.extension import ExtensionState

# What state() does the first time it is asked, whatever this process asked before.
find = extension.state.__wrapped__

needs_library = pytest.mark.skipif(
    not extension.LIBRARY.exists(), reason="the C++ kernels are not built"
)


@pytest.fixture(autouse=True)
def no_wish(monkeypatch) -> None:
    monkeypatch.delenv(extension.SWITCH, raising=False)


@pytest.fixture
def unusable(monkeypatch):
    """Make every question find no library, and the warning fresh."""
    state = ExtensionState(usable=False, detail="planted reason")
    monkeypatch.setattr(extension, "state", lambda: state)
    extension._warn_once.cache_clear()
    yield
    extension._warn_once.cache_clear()


def ask(library: Path | str) -> str:
    """Return what a process of its own finds: a second library cannot be loaded into this one."""
    code = (
        "from ipu_pipeline.ops import extension\n"
        "state = extension.state()\n"
        "print(state.usable, state.detail, state.instruction_set, extension.operators())"
    )
    environment = {**os.environ, extension.SWITCH: str(library), "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


def planted(tmp_path: Path, content: bytes) -> Path:
    file = tmp_path / "planted.so"
    file.write_bytes(content)
    return file


# ---------------------------------------------------------------- the library is there


@needs_library
def test_library_says_what_it_is() -> None:
    state = find()
    assert state.usable
    assert state.detail == str(extension.LIBRARY)
    assert state.built_for.split(".")[:2] == torch.__version__.split(".")[:2]
    assert state.instruction_set in ("baseline", "avx2", "avx512")


@needs_library
def test_operators_are_listed_without_the_one_that_describes_the_library() -> None:
    find()
    names = extension.operators()
    assert list(names) == sorted(set(names))
    assert "build_info" not in names
    assert all(hasattr(torch.ops.ipu_pipeline, name) for name in names)


@needs_library
def test_library_at_another_path(tmp_path) -> None:
    other = tmp_path / "other.so"
    shutil.copy(extension.LIBRARY, other)
    assert ask(other).startswith(f"True {other} ")


@needs_library
def test_require_finds_the_library(monkeypatch) -> None:
    monkeypatch.setenv(extension.SWITCH, "require")
    assert find().usable


# ---------------------------------------------------------------- it is not, or does not fit


def test_switched_off(monkeypatch) -> None:
    monkeypatch.setenv(extension.SWITCH, "off")
    assert find() == ExtensionState(usable=False, detail="switched off by IPU_PIPELINE_KERNELS=off")


def test_switched_off_has_no_operators() -> None:
    assert ask("off") == "False switched off by IPU_PIPELINE_KERNELS=off  ()\n"


def test_path_that_does_not_exist(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(extension.SWITCH, str(tmp_path / "none.so"))
    assert find().detail == f"IPU_PIPELINE_KERNELS names {tmp_path}/none.so, which is not a file"


def test_missing_library_gives_the_reason_of_the_build(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(extension, "BUILD_NOTE", tmp_path / "none.txt")
    assert find().detail == (
        "not built: install ipu-pipeline again with pip install --no-build-isolation where there "
        "is a C++ compiler"
    )
    (tmp_path / "none.txt").write_text("not built: no compiler\n")
    assert find() == ExtensionState(usable=False, detail="not built: no compiler")


def test_file_that_is_no_such_library(monkeypatch, tmp_path) -> None:
    file = planted(tmp_path, b"not a library")
    monkeypatch.setenv(extension.SWITCH, str(file))
    assert find().detail.startswith(f"{file} is not a library of these kernels: install")


def test_broken_library(monkeypatch, tmp_path) -> None:
    file = planted(tmp_path, f"ipu_pipeline kernels for torch {torch.__version__};".encode())
    monkeypatch.setenv(extension.SWITCH, str(file))
    state = find()
    assert not state.usable
    assert state.detail.startswith(f"{file} does not load (")
    assert state.detail.endswith("--no-build-isolation")


@pytest.mark.parametrize(
    ("this", "fits"), [("2.7.0", True), ("2.7.9+cpu", True), ("2.8.0", False), ("3.7.0", False)]
)
def test_library_for_another_minor_version_is_not_loaded(
    monkeypatch, tmp_path, this: str, fits: bool
) -> None:
    loaded = []
    monkeypatch.setattr(extension, "_load", lambda *arguments: loaded.append(arguments))
    file = planted(tmp_path, b"\x00ipu_pipeline kernels for torch 2.7.1; \x00")
    monkeypatch.setenv(extension.SWITCH, str(file))
    monkeypatch.setattr(torch, "__version__", this)
    state = find()
    assert loaded == ([(file, "2.7.1")] if fits else [])
    if not fits:
        remedy = "install ipu-pipeline again with pip install --no-build-isolation"
        assert state == ExtensionState(
            usable=False,
            detail=f"built for torch 2.7.1, this is {this}: {remedy}",
            built_for="2.7.1",
        )


# ---------------------------------------------------------------- what operations are told


def test_operations_are_told_once(unusable) -> None:
    message = r"the C\+\+ kernels are not used \(planted reason\); everything runs on plain torch"
    with pytest.warns(RuntimeWarning, match=message):
        assert not extension.available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not extension.available()


def test_required_library_that_is_missing_is_an_error(unusable, monkeypatch) -> None:
    monkeypatch.setenv(extension.SWITCH, "require")
    with pytest.raises(PipelineError, match=r"=require, and the C\+\+ kernels: planted reason"):
        extension.available()
