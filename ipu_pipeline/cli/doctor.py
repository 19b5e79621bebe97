"""The command ``doctor``: what is installed and what can run here. torch is imported inside."""

from __future__ import annotations

import os
import platform
import textwrap
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("ipu-pipeline", "torch", "transformers", "numpy", "safetensors", "rich", "typer")
WRAP = 80


def report() -> str:
    """Return versions, the machine's cores and memory, the kernels, and every backend's state."""
    from ipu_pipeline.ir.text import render_table
    from ipu_pipeline.planner.backend import backend_named, backend_names

    backends = [backend_named(name) for name in backend_names()]
    versions = [("python", platform.python_version()), *map(_package, PACKAGES)]
    targets = [(backend.target, *backend.doctor()) for backend in backends]
    return "\n\n".join(
        [
            render_table(("package", "version"), versions),
            render_table(("machine", "value"), _machine()),
            render_table(("kernels", "value"), _kernels()),
            render_table(("target", "state", "why"), targets),
        ]
    )


def _package(name: str) -> tuple[str, str]:
    try:
        return name, version(name)
    except PackageNotFoundError:
        return name, "not installed (run from a checkout)"


def _machine() -> list[tuple[str, str]]:
    import torch

    from ipu_pipeline.backends.cluster.launch.spec import usable_cores

    try:
        memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"
    except (AttributeError, OSError, ValueError):
        memory = "unknown"  # not a POSIX system
    return [
        ("platform", platform.platform(terse=True)),
        ("usable cores", str(usable_cores())),
        ("torch threads", str(torch.get_num_threads())),
        ("memory", memory),
        ("CUDA devices", str(torch.cuda.device_count())),
    ]


def _kernels() -> list[tuple[str, str]]:
    import torch

    from ipu_pipeline.ops import extension
    from ipu_pipeline.ops.linear import onednn_products, widens_bfloat16

    state = extension.state()
    rows = [
        ("library", "ready" if state.usable else "not used; everything runs on plain torch"),
        *_wrapped("file" if state.usable else "why not", state.detail),
        ("compiled against", f"torch {state.built_for}" if state.built_for else "unknown"),
    ]
    if not state.usable:
        return rows
    threads = torch.get_num_threads() if state.threaded else 1
    without = "" if state.threaded else " (compiled without OpenMP)"
    return [
        *rows,
        ("instruction set", state.instruction_set),
        ("float32 products", "oneDNN" if onednn_products() else "MKL, or what torch uses here"),
        ("bfloat16 products", "in float32, rounded once" if widens_bfloat16() else "torch's own"),
        ("threads", f"{threads}{without}"),
        *_wrapped("operators", ", ".join(extension.operators()) or "none"),
    ]


def _wrapped(name: str, text: str) -> list[tuple[str, str]]:
    """Return rows that hold a long text in full: the table itself would cut it off."""
    lines = textwrap.wrap(text, width=WRAP, break_long_words=False, break_on_hyphens=False)
    return [(name if index == 0 else "", line) for index, line in enumerate(lines)]
