"""Machines by name: Graphcore PODs and GPU nodes, from published facts, and described ones.

``data/machines.json`` holds families (``pod{count}``) with their sources, ``data/gpus.json`` those
of GPUs and the rates that each generation's kernels reach. A machine of your own is one JSON file,
read by its path, or found by its name (``mypod.json`` is ``mypod``) in a folder
that the environment variable ``IPU_PIPELINE_MACHINES`` lists or in a package that a distribution
announces under the entry point group ``ipu_pipeline.machines``. Its fields are those of
:class:`~ipu_pipeline.ir.machine.Machine`; equal devices may be written once, as ``device`` and
``count``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.codec import from_json, read_json
from ipu_pipeline.ir.entry_points import installed
from ipu_pipeline.ir.limits import LIMITS
from ipu_pipeline.ir.machine import Device, KernelRates, Link, Machine

GROUP = "ipu_pipeline.machines"
VARIABLE = "IPU_PIPELINE_MACHINES"
_FACTS = Path(__file__).parent / "data" / "machines.json"
_GPUS = _FACTS.with_name("gpus.json")


def machine_by_name(name: str) -> Machine:
    """Return a known machine, or read a machine file.

    Args:
        name: Such as ``pod16``, ``bow-pod64``, ``a100-80g-x8``, that of a file in one of the
            folders, or the path of a JSON file.

    Raises:
        PlanError: The name is unknown and no such file exists, or the file is wrong.
    """
    for family in _facts().values():
        match = re.fullmatch(family["name"].replace("{count}", "([0-9]+)"), name)
        count = 0 if match is None else int(match[1][:9])
        if count > LIMITS["num_devices"]:
            shown = name if len(name) <= 60 else f"{name[:60]}..."
            raise PlanError(
                f"machine {shown!r}: at most {LIMITS['num_devices']} devices are possible"
            )
        if count > 0:
            return _build(name, family, count)
    described = {path.stem: path for folder in _folders() for path in sorted(folder.glob("*.json"))}
    if name in described:
        return Machine.load(described[name])
    if Path(name).is_file():
        return Machine.load(name)
    if name == "local":
        raise PlanError("this machine, 'local', is for plan only; name another one")
    families = [family["name"].replace("{count}", "N") for family in _facts().values()]
    raise PlanError(
        f"machine {name!r} is neither known ({', '.join([*families, *described])}; N is the number "
        "of devices) nor a machine file"
    )


def ipu_facts(kind: str) -> dict[str, Any]:
    """Return the chip facts of an IPU generation (``chip`` in ``data/machines.json``).

    Raises:
        PlanError: No such generation is described.
    """
    facts = _facts()
    known = [name for name, entry in facts.items() if "chip" in entry]
    if kind not in known:
        raise PlanError(f"no chip facts for {kind!r}; known generations: {', '.join(known)}")
    return dict(facts[kind]["chip"])


def _facts() -> dict[str, Any]:
    found: dict[str, Any] = read_json(_FACTS, "the published machines", PlanError)
    return {**found, **_gpu_facts()["families"]}


def _gpu_facts() -> dict[str, Any]:
    found: dict[str, Any] = read_json(_GPUS, "the published GPUs", PlanError)
    return found


def kernel_rates(generation: str) -> KernelRates:
    """Return what the kernels of a GPU generation (``ampere``) reach of its peaks.

    Raises:
        PlanError: No such generation is described.
    """
    known = _gpu_facts()["generations"]
    if generation not in known:
        raise PlanError(
            f"no kernel rates for {generation!r}; known generations: {', '.join(known)}"
        )
    raw = {"name": generation, **known[generation]}
    return from_json(KernelRates, raw, f"kernel rates of {generation}", PlanError)


def _folders() -> Iterator[Path]:
    """Yield the folders with descriptions: from the environment, then from installed packages."""
    yield from (Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part)
    for point in installed(GROUP):
        spec = find_spec(point.value)
        yield from map(Path, (spec and spec.submodule_search_locations) or ())


def _build(name: str, family: dict[str, Any], num_devices: int) -> Machine:
    facts = dict(family["device"])
    if "kernels" in facts:
        facts["kernels"] = kernel_rates(facts["kernels"])
    return Machine(
        name=name,
        devices=tuple(
            Device(name=f"{family['device_name']}{index}", **facts) for index in range(num_devices)
        ),
        link=Link(**family["link"]),
        board_link=Link(**family["board_link"]),
        devices_per_board=family["devices_per_board"],
        backend=family["backend"],
    )
