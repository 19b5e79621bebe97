"""Build script: compiles the C++ kernels with CMake; everything static is in pyproject.toml.

The kernels are optional. Where they cannot be built, the package installs without them and the
reason is kept for ``ipu-pipeline doctor``. ``IPU_PIPELINE_KERNELS=require`` turns that into an
error, ``IPU_PIPELINE_KERNELS=off`` does not try.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SWITCH = "IPU_PIPELINE_KERNELS"


class CMakeBuild(build_ext):
    """Builds the operator library, which is no Python module: torch loads it."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return a file name without a Python tag: the library does not use Python."""
        return f"{fullname.replace('.', os.sep)}.so"

    def run(self) -> None:
        """Build straight to where each library belongs, without looking for a C compiler."""
        for extension in self.extensions:
            self.build_extension(extension)

    def build_extension(self, ext: Extension) -> None:
        """Build with CMake; leave a note and go on when that fails."""
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        note = library.with_suffix(".txt")
        note.unlink(missing_ok=True)
        # Unlinked, not overwritten: a running process may have it mapped.
        library.unlink(missing_ok=True)
        wish = os.environ.get(SWITCH, "")
        if wish == "off":
            note.write_text(f"not built: {SWITCH}=off when it was installed\n", encoding="utf-8")
            return
        try:
            shutil.copyfile(_compile(), library)
        except (OSError, RuntimeError, ImportError) as error:
            if wish == "require":
                raise
            note.write_text(f"not built: {error}\n", encoding="utf-8")
            print(f"warning: the C++ kernels are not built: {error}", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: the library depends on the platform and on torch only."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag ``py3-none-PLATFORM``."""
        return "py3", "none", super().get_tag()[2]


def _compile() -> Path:
    import torch.utils

    cmake = _tool("cmake")
    if cmake is None:
        raise RuntimeError("cmake was not found; pip install cmake, then install this again")
    folder = ROOT / "build" / "kernels"
    ninja = _tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    # Fresh: a cache may name a torch, compiler or generator that is not the one of today. What
    # is compiled already is kept, and compiled again only if its command or its headers changed.
    _run([cmake, "-S", str(ROOT), "-B", str(folder), "--fresh", *generator,
          "-DCMAKE_BUILD_TYPE=Release",
          f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"])  # fmt: skip
    _run([cmake, "--build", str(folder), "--parallel", str(_cores())])
    return folder / "kernels" / "torch" / "kernels.so"


def _tool(name: str) -> str | None:
    beside_python = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        step = "building" if "--build" in command else "configuring"
        raise RuntimeError(f"{step} with cmake failed: {_excerpt(done.stderr + done.stdout)}")


def _excerpt(output: str) -> str:
    """Return the first error of CMake or of a compiler; the last lines if there is none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if re.search(r"error:|Error at", line)), -4)
    return " | ".join(lines[first:][:4])


setup(
    ext_modules=[Extension("ipu_pipeline.ops._kernels", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
