"""Load the C++ kernels, once; without them every operation runs on plain torch.

The library is built by ``setup.py`` from ``kernels/torch`` and lies beside this file. It is
optional: an operation asks :func:`available` and takes its plain-torch path when the answer is
no. The first such question warns, once per process.

``IPU_PIPELINE_KERNELS`` in the environment: ``off`` switches the library off, ``require`` makes
its absence an error, any other value is the path of another build of it. The loops are those of
the widest instruction set that the processor has; ``IPU_PIPELINE_ISA`` asks for ``baseline``,
``avx2`` or ``avx512``.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipu_pipeline.errors import PipelineError

LIBRARY = Path(__file__).with_name("_kernels.so")
# setup.py leaves the reason here when it could not build the library.
BUILD_NOTE = Path(__file__).with_name("_kernels.txt")
SWITCH = "IPU_PIPELINE_KERNELS"
ISA_SWITCH = "IPU_PIPELINE_ISA"
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
NAMESPACE = "ipu_pipeline"
# kernels/torch/library.cpp puts these words into the library.
_MARK = re.compile(rb"ipu_pipeline kernels for torch ([0-9.]+)")
_BUILD_AGAIN = "install ipu-pipeline again with pip install --no-build-isolation"


@dataclass(frozen=True)
class ExtensionState:
    """Whether the kernels can be used, and why (not).

    Attributes:
        usable: The library is loaded and fits this torch.
        detail: Why it is not used; where it was loaded from otherwise.
        built_for: Version of torch that it was compiled against; empty if unknown.
        instruction_set: The loops it runs here: ``baseline``, ``avx2`` or ``avx512``; empty if it
            is not loaded.
        threaded: It uses as many threads as torch does.
    """

    usable: bool
    detail: str
    built_for: str = ""
    instruction_set: str = ""
    threaded: bool = False


@functools.cache
def state() -> ExtensionState:
    """Load the library on the first call; return whether its operators can be used."""
    wish = os.environ.get(SWITCH, "")
    if wish == "off":
        return ExtensionState(usable=False, detail=f"switched off by {SWITCH}=off")
    asked = os.environ.get(ISA_SWITCH, "")
    if asked not in ("", *INSTRUCTION_SETS):
        detail = f"{ISA_SWITCH}={asked} is unknown; use one of {', '.join(INSTRUCTION_SETS)}"
        return ExtensionState(usable=False, detail=detail)
    library = LIBRARY if wish in ("", "require") else Path(wish)
    if not library.is_file():
        return ExtensionState(usable=False, detail=_why_missing(library))
    built_for = _built_for(library)
    refusal = _why_unfit(library, built_for)
    if refusal is None:
        return _load(library, built_for)
    return ExtensionState(usable=False, detail=refusal, built_for=built_for)


def available() -> bool:
    """Whether the C++ operators can be used; warns on the first ``False`` of a process.

    Raises:
        PipelineError: They cannot, and ``IPU_PIPELINE_KERNELS=require``.
    """
    if state().usable:
        return True
    if os.environ.get(SWITCH) == "require":
        raise PipelineError(f"{SWITCH}=require, and the C++ kernels: {state().detail}")
    _warn_once()
    return False


def operators() -> tuple[str, ...]:
    """Return the names of all operators on tensors, sorted; none if the library is not usable."""
    if not state().usable:
        return ()
    ours = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{NAMESPACE}::")]
    return tuple(sorted({s.name.partition("::")[2] for s in ours if "Tensor" in str(s)}))


def _built_for(library: Path) -> str:
    found = _MARK.search(library.read_bytes())
    return found[1].decode() if found else ""


def _why_missing(library: Path) -> str:
    if library != LIBRARY:
        return f"{SWITCH} names {library}, which is not a file"
    if BUILD_NOTE.exists():
        return BUILD_NOTE.read_text(encoding="utf-8").strip()
    return f"not built: {_BUILD_AGAIN} where there is a C++ compiler"


def _why_unfit(library: Path, built_for: str) -> str | None:
    """Say what is wrong with a file before it is loaded: one for another torch may crash."""
    if not built_for:
        return f"{library} is not a library of these kernels: {_BUILD_AGAIN}"
    if _minor(built_for) != _minor(torch.__version__):
        return f"built for torch {built_for}, this is {torch.__version__}: {_BUILD_AGAIN}"
    return None


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def _load(library: Path, built_for: str) -> ExtensionState:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        detail = f"{library} does not load ({error}): {_BUILD_AGAIN}"
        return ExtensionState(usable=False, detail=detail, built_for=built_for)
    _, instruction_set, threads = str(torch.ops.ipu_pipeline.build_info()).split("; ")
    asked = os.environ.get(ISA_SWITCH, "")
    if asked not in ("", instruction_set):
        detail = (
            f"{ISA_SWITCH}={asked}, and the library runs {instruction_set} on this processor; "
            f"ask for that, or do not set {ISA_SWITCH}"
        )
        return ExtensionState(usable=False, detail=detail, built_for=built_for)
    return ExtensionState(
        usable=True,
        detail=str(library),
        built_for=built_for,
        instruction_set=instruction_set,
        threaded=threads != "one thread",
    )


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"the C++ kernels are not used ({state().detail}); everything runs on plain torch, slower "
        "and with more memory",
        RuntimeWarning,
        stacklevel=3,
    )


def kernels(**fakes: Callable[..., Any]) -> Callable[..., bool]:
    """Return a function that says whether the operators take its arguments, tensors.

    They run on a CPU, their shapes on meta as well, and where :func:`available` was true when it
    was first asked. That question also tells torch what the operators, by name, return for tensors
    without data.
    """

    @functools.cache
    def usable() -> bool:
        if not available():
            return False
        for name, fake in fakes.items():
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
        return True

    def take(*tensors: Tensor) -> bool:
        return all(tensor.device.type in ("cpu", "meta") for tensor in tensors) and usable()

    return take
