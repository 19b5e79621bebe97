"""Machines by name: Graphcore PODs and GPU nodes, from published facts (``data/machines.json``)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.machine import Device, Link, Machine

_FACTS = Path(__file__).parent / "data" / "machines.json"
# name pattern -> (entry of the facts, name of one device); the number is the device count.
_FAMILIES = (
    (re.compile(r"^pod(\d+)$"), "ipu-gc200", "ipu"),
    (re.compile(r"^bow-pod(\d+)$"), "ipu-bow", "ipu"),
    (re.compile(r"^a100-80g-x(\d+)$"), "a100-80g", "gpu"),
)
KNOWN = "pod4, pod16, pod64, ..., bow-pod4, bow-pod16, ..., a100-80g-x8, a100-80g-x16, ..."


def machine_by_name(name: str) -> Machine:
    """Return a known machine, or read a machine file.

    Args:
        name: Such as ``pod16``, ``bow-pod64``, ``a100-80g-x8``, or the path of a JSON file.

    Raises:
        PlanError: The name is unknown and no such file exists, or the file is wrong.
    """
    for pattern, family, device_name in _FAMILIES:
        match = pattern.match(name)
        if match is not None and int(match[1]) > 0:
            return _build(name, family, device_name, int(match[1]))
    if Path(name).is_file():
        return Machine.load(name)
    raise PlanError(f"machine {name!r} is neither known ({KNOWN}), nor 'local', nor a machine file")


def ipu_facts(kind: str) -> dict[str, Any]:
    """Return the chip facts of an IPU generation (``chip`` in ``data/machines.json``).

    Raises:
        PlanError: No such generation is described.
    """
    facts: dict[str, Any] = _facts()
    known = [name for name, entry in facts.items() if "chip" in entry]
    if kind not in known:
        raise PlanError(f"no chip facts for {kind!r}; known generations: {', '.join(known)}")
    return dict(facts[kind]["chip"])


def _facts() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_FACTS.read_text(encoding="utf-8"))
    return found


def _build(name: str, family: str, device_name: str, num_devices: int) -> Machine:
    facts: dict[str, Any] = _facts()[family]
    devices = tuple(
        Device(name=f"{device_name}{index}", **facts["device"]) for index in range(num_devices)
    )
    return Machine(
        name=name,
        devices=devices,
        link=Link(**facts["link"]),
        board_link=Link(**facts["board_link"]),
        devices_per_board=facts["devices_per_board"],
    )
