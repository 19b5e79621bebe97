from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.machines import kernel_rates, machine_by_name
from tests.ir.plan_example import example_machine


@pytest.mark.parametrize(
    ("name", "num_devices", "kind"),
    [
        ("pod4", 4, "ipu"), ("pod16", 16, "ipu"), ("pod64", 64, "ipu"), ("bow-pod16", 16, "ipu"),
        *((f"{family}-x8", 8, "gpu") for family in (
            "rtx3090", "rtx4090", "l4", "l40s", "a100-40g", "a100-80g", "a100-40g-pcie",
            "a100-80g-pcie", "h100", "h200", "gh200", "b200", "b300", "gb200", "gb300", "mi300x")),
        ("h100-x64", 64, "gpu"), ("gb200-nvl72", 72, "gpu"), ("gb300-nvl72", 72, "gpu"),
    ],
)  # fmt: skip
def test_presets(name: str, num_devices: int, kind: str) -> None:
    machine = machine_by_name(name)
    assert machine.name == name
    assert len(machine.devices) == num_devices
    assert machine.devices[-1].name == f"{kind}{num_devices - 1}"
    assert machine.devices[0].memory_bytes > machine.devices[0].reserved_bytes
    assert machine.devices[0].peak_flops_per_s("float16") > machine.devices[0].peak_flops_per_s(
        "float32"
    )
    assert not machine.shared_memory


def test_bow_is_the_faster_ipu_with_the_same_memory() -> None:
    plain, bow = machine_by_name("pod4").devices[0], machine_by_name("bow-pod4").devices[0]
    assert bow.memory_bytes == plain.memory_bytes
    assert bow.peak_flops_per_s("float16") > plain.peak_flops_per_s("float16")


def test_link_between_boards_is_another_one() -> None:
    machine = machine_by_name("pod16")
    per_board = machine.devices_per_board
    assert machine.link_between(0, per_board - 1) == machine.link
    assert machine.link_between(per_board - 1, per_board) == machine.board_link
    assert machine.link_between(per_board, per_board - 1) == machine.board_link
    toy = example_machine()
    assert toy.link_between(0, 1) == toy.link


def test_transfer_time() -> None:
    link = Link(bytes_per_s=100.0, latency_s=0.5)
    assert link.transfer_s(50) == 1.0
    assert link.transfer_s(0) == 0.0


def test_unlisted_dtype_takes_the_float32_peak() -> None:
    device = example_machine().devices[0]
    assert device.peak_flops_per_s("float16") == 4e9
    assert device.peak_flops_per_s("float64") == 1e9


@pytest.mark.parametrize("name", ["pod16", "a100-80g-x8"])
def test_file_round_trip(tmp_path: Path, name: str) -> None:
    machine = machine_by_name(name)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(machine.to_json()))
    loaded = machine_by_name(str(path))
    assert loaded == machine
    assert loaded.fingerprint() == machine.fingerprint()


def test_the_kernels_of_a_described_device_may_be_a_generation() -> None:
    known = machine_by_name("h100-x2")
    device = {**known.to_json()["devices"][0], "name": "gpu", "kernels": "hopper"}
    raw = {**known.to_json(), "device": device, "count": 2}
    del raw["devices"]
    assert Machine.from_json(raw) == known
    device["kernels"] = "kepler"
    with pytest.raises(PlanError, match=r"no kernel rates for 'kepler'; known .*hopper"):
        Machine.from_json(raw)


@pytest.mark.parametrize("name", ["pod0", "pod", "pod-16", "a100", "nosuch.json"])
def test_unknown_machine_names_the_known_ones(name: str) -> None:
    with pytest.raises(PlanError, match=rf"machine '{name}' is neither known \(podN, bow-podN"):
        machine_by_name(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bytes": 0}, "needs memory_bytes above 0 and reserved_bytes of .*, got 0 and 0"),
        ({"reserved_bytes": -1}, "and reserved_bytes of at least 0, got 1 and -1"),
        ({"memory_bytes_per_s": -1.0}, "needs rates from 1e-09 to .*, got memory_bytes_per_s -1.0"),
        ({"flops_per_s": {"float16": 1.0}}, "gives no flops_per_s for float32"),
        ({"flops_per_s": {"float32": 0.0}}, "got flops_per_s of float32 0.0"),
        ({"flops_per_s": {"float32": 1e-308}}, "got flops_per_s of float32 1e-308"),
        ({"op_overhead_s": 1e308}, r"times from 0 to 1000000000.0 seconds, got op_overhead_s 1e"),
    ],
)
def test_wrong_devices_are_refused(change: dict, message: str) -> None:
    fields = {"name": "d", "memory_bytes": 1, "flops_per_s": {"float32": 1.0},
              "memory_bytes_per_s": 1.0, **change}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Device(**fields)


def test_wrong_links_and_empty_machines_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a link needs rates .* got bytes_per_s 0"):
        Link(0)
    with pytest.raises(ValueError, match="got latency_s -1"):
        Link(1, -1)
    with pytest.raises(ValueError, match="machine 'none' has 0 devices"):
        Machine("none", (), Link(1))
    with pytest.raises(ValueError, match="has -1 devices_per_board; give how many"):
        replace(example_machine(), devices_per_board=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the machine file"),
        ("{}", "machine.json: missing field 'name', 'devices', 'link'"),
        ('{"devices": [{"nme": 1}]}', r"devices\[0\]: Object missing required field `name`"),
        ("[1, 2]", "expected an object with fields, got list"),
        (b"\xff\xff", "cannot read the machine file"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError, match=message):
        Machine.load(path)


def test_description_with_a_list_for_a_map_is_refused() -> None:
    raw = example_machine().to_json()
    raw["devices"][0]["flops_per_s"] = ["float32"]
    with pytest.raises(
        PlanError,
        match=r"machine description, devices\[0\]\.flops_per_s: Expected `object`, got `array`",
    ):
        Machine.from_json(raw)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the machine file"):
        Machine.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("op_overhead_s", -1.0, "times from 0 to .* got op_overhead_s -1.0"),
        ("op_rates", {"gelu": 0.0}, "got op_rates of gelu 0.0"),
        ("bytes_curve", ((1.0, 0.0),), "got rate of bytes_curve at 1.0 0.0"),
        ("product_curve", ((2.0, 1.0), (1.0, 1.0)), r"above 0 and rising: \[2.0, 1.0\]"),
        ("bytes_curve", ((0.0, 1.0),), r"above 0 and rising: \[0.0\]"),
    ],
)
def test_wrong_measurements_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Device("d", 1, {"float32": 1.0}, 1.0, **{field: value})  # type: ignore[arg-type]


def test_a_file_may_say_so_many_of_one_device() -> None:
    raw = machine_by_name("h100-x2").to_json()
    one = {**raw.pop("devices")[0], "name": "gpu"}
    found = Machine.from_json({**raw, "device": one, "count": 2})
    assert found == machine_by_name("h100-x2")
    with pytest.raises(PlanError, match="the count of one device must be a whole number, got None"):
        Machine.from_json({**raw, "device": one})
    with pytest.raises(PlanError, match="it has device and devices; give one of them"):
        Machine.from_json({**raw, "device": one, "count": 2, "devices": []})
    with pytest.raises(PlanError, match="device: missing field"):
        Machine.from_json({**raw, "device": {"name": "gpu"}, "count": 2})


def test_kernel_rates_of_a_generation() -> None:
    hopper = kernel_rates("hopper")
    assert machine_by_name("h200-x8").devices[0].kernels == hopper
    small, large = (hopper.product_efficiency("bfloat16", (n, n, n)) for n in (128, 16384))
    assert small < large < hopper.product_share["bfloat16"]
    assert hopper.product_efficiency("float16", ()) == hopper.product_share["bfloat16"]
    with pytest.raises(PlanError, match="no kernel rates for 'volta'; known generations: ampere"):
        kernel_rates("volta")
    with pytest.raises(ValueError, match="kernels give no product_share for bfloat16"):
        replace(hopper, product_share={"float8": 0.5})
    with pytest.raises(ValueError, match="need shares above 0 and at most 1, and a half_size"):
        replace(hopper, link_share=1.5)
