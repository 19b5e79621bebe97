"""What CMake says where the libraries that the C++ parts need are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CMAKE = shutil.which(
    "cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)
pytestmark = pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")

POPART = ("-DIPU_PIPELINE_WITH_TORCH=OFF", "-DIPU_PIPELINE_WITH_POPART=ON")
LIBRARIES = ("popart", "poplar", "poplin", "popnn", "popops", "poputil")


def configure(root: Path, folder: Path, *options: str, **variables: str) -> tuple[int, str]:
    """Return the exit code and what CMake said, on one line."""
    assert CMAKE is not None
    environment = {key: value for key, value in os.environ.items() if key != "POPLAR_SDK_ENABLED"}
    done = subprocess.run(
        [CMAKE, "-S", str(root), "-B", str(folder / "build"), *options],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, " ".join(done.stderr.split())


def fake_sdk(folder: Path) -> str:
    """Plant the files that CMake looks for; return the value of CMAKE_PREFIX_PATH."""
    for name in ("popart/op.hpp", "poplin/MatMul.hpp"):
        file = folder / "include" / name
        file.parent.mkdir(parents=True)
        file.touch()
    (folder / "lib").mkdir()
    for name in LIBRARIES:
        (folder / "lib" / f"lib{name}.so").touch()
    return f"-DCMAKE_PREFIX_PATH={folder}"


def test_popart_without_the_sdk_names_all_that_is_missing(root: Path, tmp_path: Path) -> None:
    code, said = configure(root, tmp_path, *POPART)
    assert code != 0
    assert said.count("CMake Error at") == 1
    missing = (
        "the variable POPLAR_SDK_ENABLED",
        "the header popart/op.hpp",
        "the header poplin/MatMul.hpp",
        *(f"the library {name}" for name in LIBRARIES),
    )
    message = (
        "IPU_PIPELINE_WITH_POPART=ON needs Graphcore's Poplar SDK; not found: "
        f'{", ".join(missing)}. Run "source enable.sh" in the SDK\'s poplar and popart folders '
        "and configure again, or leave IPU_PIPELINE_WITH_POPART off: only IPUs use it."
    )
    assert message in said


def test_popart_with_an_incomplete_sdk_names_the_rest(root: Path, tmp_path: Path) -> None:
    prefix = fake_sdk(tmp_path / "sdk")
    (tmp_path / "sdk" / "lib" / "libpopnn.so").unlink()
    code, said = configure(root, tmp_path, *POPART, prefix, POPLAR_SDK_ENABLED="/sdk")
    assert code != 0
    assert "not found: the library popnn. Run" in said


def test_popart_with_an_sdk_is_configured(root: Path, tmp_path: Path) -> None:
    prefix = fake_sdk(tmp_path / "sdk")
    assert configure(root, tmp_path, *POPART, prefix, POPLAR_SDK_ENABLED="/sdk") == (0, "")


def test_torch_that_is_not_there(root: Path, tmp_path: Path) -> None:
    code, said = configure(root, tmp_path, f"-DCMAKE_PREFIX_PATH={tmp_path}/none")
    assert code != 0
    assert said.count("CMake Error at") == 1
    assert f'torch was not found at CMAKE_PREFIX_PATH="{tmp_path}/none"; set it to what' in said


def test_popart_sources_say_that_they_were_not_compiled(root: Path) -> None:
    sources = [*(root / "kernels" / "popart").glob("*.[ch]pp")]
    assert len(sources) == 3
    for source in sources:
        assert (
            "// NOT COMPILED where this repository is made" in source.read_text().split("\n\n")[0]
        )
