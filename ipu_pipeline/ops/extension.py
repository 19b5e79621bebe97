"""Load the C++ kernels, once; without them every operation runs on plain torch.

The library is built by ``setup.py`` from ``kernels/torch`` and lies beside this file. It is
optional: an operation asks :func:`available` and takes its plain-torch path when the answer is
no. The first such question warns, once per process.

``IPU_PIPELINE_KERNELS=off`` in the environment switches the library off; any other value is the
path of another build of it.
"""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_kernels.so")
# setup.py leaves the reason here when it could not build the library.
BUILD_NOTE = Path(__file__).with_name("_kernels.txt")
SWITCH = "IPU_PIPELINE_KERNELS"


@dataclass(frozen=True)
class ExtensionState:
    """Whether the kernels can be used, and why (not).

    Attributes:
        usable: The library is loaded and fits this torch.
        detail: What it was built for and runs on, or why it is not used.
    """

    usable: bool
    detail: str


@functools.cache
def state() -> ExtensionState:
    """Load the library on the first call; return whether its operators can be used."""
    wish = os.environ.get(SWITCH, "")
    if wish == "off":
        return ExtensionState(usable=False, detail=f"switched off by {SWITCH}=off")
    library = Path(wish) if wish else LIBRARY
    if not library.exists():
        return ExtensionState(usable=False, detail=_why_missing(library))
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return ExtensionState(usable=False, detail=f"{library} does not load: {error}")
    info = str(torch.ops.ipu_pipeline.build_info())
    built_for = info.split(",")[0].removeprefix("torch ")
    if _minor(built_for) != _minor(torch.__version__):
        detail = f"built for torch {built_for}, this is {torch.__version__}: install again"
        return ExtensionState(usable=False, detail=detail)
    return ExtensionState(usable=True, detail=info)


def _why_missing(library: Path) -> str:
    if library != LIBRARY:
        return f"{SWITCH} names {library}, which does not exist"
    if BUILD_NOTE.exists():
        return BUILD_NOTE.read_text(encoding="utf-8").strip()
    return "not built: install the package again where there is a C++ compiler"


def available() -> bool:
    """Whether the C++ operators can be used; warns on the first ``False`` of a process."""
    if state().usable:
        return True
    _warn_once()
    return False


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"the C++ kernels are not used ({state().detail}); everything runs on plain torch, slower "
        "and with more memory",
        RuntimeWarning,
        stacklevel=3,
    )


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])
