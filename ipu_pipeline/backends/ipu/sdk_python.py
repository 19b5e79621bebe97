"""Where the SDK's Python is: named by an option or a variable, never searched for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ipu_pipeline.errors import LoweringError

VARIABLE = "IPU_PIPELINE_SDK_PYTHON"
EMULATE = "--emulate"
# What doctor asks it; importing torch would take seconds.
_QUESTION = """
import json, platform
from importlib.util import find_spec
try:
    from importlib.metadata import version
except ImportError:
    version = lambda name: "present"
def found(name):
    try:
        return version(name)
    except Exception:
        return "present" if find_spec(name) else None
names = ("torch", "transformers", "poptorch")
print(json.dumps({"python": platform.python_version(), **{n: found(n) for n in names}}))
"""


@dataclass(frozen=True)
class SdkPython:
    """A Python that runs the worker.

    Attributes:
        path: Its executable.
        stand_in: Folder of the stand-in's package, where that takes the place of poptorch.
    """

    path: str
    stand_in: str = ""

    def versions(self) -> dict[str, str | None]:
        """Return the versions of Python and of what the worker needs there; ``None``: missing.

        Raises:
            LoweringError: It does not run.
        """
        try:
            answer = subprocess.run(
                [self.path, "-c", _QUESTION], capture_output=True, text=True, check=True, timeout=60
            ).stdout
            found: dict[str, str | None] = json.loads(answer)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise LoweringError(
                f"{self.path} does not run as Python: {error}; name the SDK's Python by "
                f"sdk_python or {VARIABLE}"
            ) from error
        return found


def find_sdk_python(option: str | None) -> SdkPython:
    """Return the Python that the option, or else the variable, names.

    ``--emulate`` behind it asks for the stand-in instead of poptorch; alone, it also means this
    Python.

    Raises:
        LoweringError: Neither names one, there is no such file, or no stand-in.
    """
    said = option if option is not None else os.environ.get(VARIABLE, "")
    if not said.strip():
        raise LoweringError(
            "IPUs are driven under the Python of Graphcore's SDK, and none is named: pass "
            "sdk_python='/path/to/the/sdk/venv/bin/python' to compile(), or set the variable "
            f"{VARIABLE} to it. Without an SDK you can write a bundle for a machine that has it "
            "(ipu-pipeline emit PLAN -o bundle/), run that on the CPU (ipu-pipeline run bundle/ "
            f"--emulate), train here on the stand-in ({VARIABLE}={EMULATE}), or use target='local'"
        )
    words = said.strip()
    emulated = words == EMULATE or words.endswith(" " + EMULATE)
    name = words[: -len(EMULATE)].strip() if emulated else words
    path = shutil.which(Path(name).expanduser()) if name else sys.executable
    if path is None:
        raise LoweringError(
            f"sdk_python or {VARIABLE} names {name!r}, which is no file that can be run; give the "
            "path of the SDK's Python"
        )
    return SdkPython(str(Path(path).absolute()), _stand_in() if emulated else "")


def _stand_in() -> str:
    try:
        spec = find_spec("ipu_pipeline_emulator")
    except ValueError:  # somebody put None in its place
        spec = None
    if spec is None or spec.origin is None:
        raise LoweringError(
            "the stand-in for poptorch is not installed; get it with pip install "
            "ipu-pipeline-emulator, or from a checkout with pip install -e tools/emulator"
        )
    return str(Path(spec.origin).parent)


def doctor() -> tuple[str, str]:
    """Say which Python is named, and what is there."""
    if not os.environ.get(VARIABLE, "").strip():
        return "unavailable", f"set {VARIABLE} to the Python of Graphcore's SDK"
    try:
        python = find_sdk_python(None)
        versions = python.versions()
    except LoweringError as error:
        return "unavailable", str(error)
    if python.stand_in:
        versions["poptorch"] = "the stand-in, on the CPU"
    said = ", ".join(f"{name} {value or 'is missing'}" for name, value in versions.items())
    state = "ready" if all(versions.values()) else "unavailable"
    return state, f"{python.path}: {said}"
