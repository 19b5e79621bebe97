"""What `pip install` makes: with the C++ kernels, without a compiler, and switched off."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ipu_pipeline.ops import extension

SETUP = ("setup.py", "CMakeLists.txt", "kernels")
needs_library = pytest.mark.skipif(
    not extension.LIBRARY.exists(), reason="the C++ kernels are not built"
)


def python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != extension.SWITCH}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


# ---------------------------------------------------------------- a wheel with the kernels


def assert_wheel(wheel: Path) -> None:
    name, version, *tag = wheel.stem.split("-")
    assert tag[:2] == ["py3", "none"]
    assert tag[2] != "any"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{info}/WHEEL").decode()
    assert f"Tag: {'-'.join(tag)}\n" in metadata
    for file in (
        "ops/_kernels.so",
        "py.typed",
        "backends/ipu/config/presets.json",
        "planner/report/page.html",
    ):
        assert f"ipu_pipeline/{file}" in names
    assert "ipu_pipeline/ops/_kernels.txt" not in names
    assert {file.split("/")[0] for file in names} == {"ipu_pipeline", info}


@pytest.mark.acceptance
@pytest.mark.timeout(600)
@needs_library
def test_wheel_has_the_kernels_and_runs_them(root: Path, tmp_path: Path) -> None:
    command = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    built = python(root, *command, "-w", str(tmp_path), str(root), IPU_PIPELINE_KERNELS="require")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert_wheel(wheel)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "from ipu_pipeline.ops import extension\n"
        "print(extension.available(), extension.state().detail)"
    )
    ran = python(tmp_path, "-W", "error", "-c", code, PYTHONPATH=str(site))
    assert ran.stdout == f"True {site / 'ipu_pipeline/ops/_kernels.so'}\n", ran.stderr


def test_source_distribution_can_compile(root: Path, tmp_path: Path) -> None:
    for name in (
        *SETUP,
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
        "constraints.txt",
    ):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, tmp_path / name)
    (tmp_path / "ipu_pipeline").mkdir()
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    made = python(tmp_path, "-c", code)
    assert made.returncode == 0, made.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {
        str(path.relative_to(root)) for path in (root / "kernels").rglob("*") if path.is_file()
    }
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml"} | sources <= names


# ---------------------------------------------------------------- without them


def has_cmake() -> bool:
    beside_python = Path(sys.executable).parent
    return (
        shutil.which("cmake", path=f"{beside_python}{os.pathsep}{os.environ['PATH']}") is not None
    )


needs_cmake = pytest.mark.skipif(not has_cmake(), reason="cmake is not installed")


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """Only what setup.py needs, so that a build of the real sources is never touched."""
    for name in SETUP:
        method = shutil.copytree if (root / name).is_dir() else shutil.copy
        method(root / name, tmp_path / name)
    folder = tmp_path / "out" / "ipu_pipeline" / "ops"
    folder.mkdir(parents=True)
    (folder / "_kernels.so").write_bytes(b"of an older build")
    return tmp_path


def build(copy: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], str | None]:
    """Run the build; return what it said and the reason it left, if any."""
    done = python(copy, "setup.py", "--quiet", "build_ext", "--build-lib", "out", **variables)
    folder = copy / "out" / "ipu_pipeline" / "ops"
    assert not (folder / "_kernels.so").exists(), "a library that is not from this build"
    note = folder / "_kernels.txt"
    return done, note.read_text() if note.exists() else None


@needs_cmake
def test_without_a_compiler_the_reason_is_kept(copy: Path) -> None:
    done, note = build(copy, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert note is not None
    assert note.startswith("not built: configuring with cmake failed: CMake Error")
    assert "/nonexistent/c++" in note
    assert "warning: the C++ kernels are not built" in done.stderr


@needs_cmake
def test_required_kernels_that_cannot_be_built_are_an_error(copy: Path) -> None:
    done, note = build(copy, CXX="/nonexistent/c++", IPU_PIPELINE_KERNELS="require")
    assert done.returncode != 0
    assert note is None
    assert "RuntimeError: " in done.stderr


def test_missing_cmake_is_named(copy: Path) -> None:
    code = (
        "import shutil, sys; shutil.which = lambda *_, **__: None; "
        "sys.argv = ['setup.py', '--quiet', 'build_ext', '--build-lib', 'out']; "
        "exec(open('setup.py').read())"
    )
    done = python(copy, "-c", f"__file__ = 'setup.py'; {code}")
    assert done.returncode == 0, done.stderr
    reason = "cmake was not found; pip install cmake, then install this again"
    note = copy / "out" / "ipu_pipeline" / "ops" / "_kernels.txt"
    assert note.read_text() == f"not built: {reason}\n"


def test_switched_off_is_not_tried(copy: Path) -> None:
    done, note = build(copy, IPU_PIPELINE_KERNELS="off")
    assert done.returncode == 0, done.stderr
    assert note == "not built: IPU_PIPELINE_KERNELS=off when it was installed\n"
    assert not (copy / "build").exists()


@pytest.mark.slow
@needs_library
def test_compiler_error_is_quoted(copy: Path) -> None:
    for source in (copy / "kernels" / "torch").rglob("*.cpp"):
        source.unlink()
    (copy / "kernels" / "torch" / "bad.cpp").write_text("#error planted\n")
    done, note = build(copy)
    assert done.returncode == 0, done.stderr
    assert note is not None
    assert note.startswith("not built: building with cmake failed: ")
    assert "bad.cpp:1:2: error: #error planted" in note


def test_an_editable_install_is_a_path_that_type_checkers_follow(copy: Path, root: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy / name)
    (copy / "ipu_pipeline" / "ops").mkdir(parents=True)
    for name in ("__init__.py", "py.typed", "ops/__init__.py"):
        (copy / "ipu_pipeline" / name).touch()
    code = "from setuptools import build_meta; build_meta.build_editable('dist')"
    made = python(copy, "-c", code, IPU_PIPELINE_KERNELS="off")
    assert made.returncode == 0, made.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        assert archive.read(name).decode().strip() == str(copy)
