from __future__ import annotations

import json
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ipu_pipeline.backends.local.measure import blocks as blocks_module
from ipu_pipeline.backends.local.measure import local_machine, profile_blocks
from ipu_pipeline.backends.local.measure import local_machine as exported
from ipu_pipeline.backends.local.measure.cache import (
    cache_folder,
    load_measurements,
    store_measurements,
)
from ipu_pipeline.backends.local.measure.machine import on_threads
from ipu_pipeline.capture import capture
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ir.attention import ATTENTION
from ipu_pipeline.ir.machine import Device, Machine
from tests.quick_calibration import make_quick
from tests.tiny_models import TINY


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IPU_PIPELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def test_machine_description(quick: None, cache: Path) -> None:
    machine = local_machine(2)
    assert exported is local_machine
    assert (machine.name, len(machine.devices), machine.shared_memory) == ("local", 2, True)
    device = machine.devices[1]
    assert device.name == "cpu1"
    assert set(device.flops_per_s) == {"float32", "bfloat16"}
    assert 1e6 < device.peak_flops_per_s("float32") < 1e14
    assert 1e6 < device.memory_bytes_per_s < 1e13
    assert 0 < device.memory_bytes < 1e14
    assert machine.link.bytes_per_s == device.memory_bytes_per_s
    assert machine.link.latency_s == 0
    assert [size for size, _ in device.product_curve] == [2 * 8**3, 2 * 16**3]
    assert [size for size, _ in device.bytes_curve] == [8 << 8, 8 << 12]
    assert 0 < device.op_overhead_s < 1
    assert {"gelu", "bmm", "bernoulli_", ATTENTION, f"{ATTENTION}_dropout_backward"} <= set(
        device.op_rates
    )
    assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine
    assert [path.name for path in cache.glob("[!.]*")] == ["device-2x1.json"]


def test_measured_once(quick: None, cache: Path) -> None:
    first = local_machine(2).devices[0].flops_per_s
    kept = load_measurements("device-2x1", Device)
    assert kept is not None
    store_measurements("device-2x1", replace(kept, flops_per_s={"float32": 123.0}))
    assert local_machine(2).devices[0].flops_per_s["float32"] == 123.0
    assert local_machine(1).devices[0].flops_per_s["float32"] != 123.0
    assert first["float32"] != 123.0


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"machine": 1}', "TEXT", "[" * 5000, '{"sha256": ""}',
     lambda text: text.replace("1.0", "-1.0"), lambda text: text.replace("1.0", "1e9"),
     lambda text: text[:-9]],
)  # fmt: skip
def test_a_damaged_entry_is_dropped_with_a_log_line(
    cache: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    store_measurements("x", {"a": 1.0})
    file = cache / "x.json"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    file.write_text(damage if isinstance(damage, str) else damage(file.read_text()))
    assert load_measurements("x", dict[str, float]) is None
    assert f"{file} is damaged, so it is measured again" in caplog.text
    store_measurements("x", {"a": 2.0})
    assert load_measurements("x", dict[str, float]) == {"a": 2.0}


def test_a_folder_in_the_place_of_an_entry_is_dropped(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / "x.json").mkdir(parents=True)
    assert load_measurements("x", dict[str, float]) is None
    assert "it is a folder" in caplog.text
    store_measurements("x", {"a": 2.0})


def test_what_was_measured_in_another_way_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    store_measurements("x", {"a": 1.0})
    assert load_measurements("x", dict[str, float]) == {"a": 1.0}
    monkeypatch.setenv("IPU_PIPELINE_MATMUL", "mkl")
    assert load_measurements("x", dict[str, float]) is None
    monkeypatch.delenv("IPU_PIPELINE_MATMUL")
    monkeypatch.setattr("ipu_pipeline.backends.local.measure.cache.METHOD", 0)
    assert load_measurements("x", dict[str, float]) is None


def test_no_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="num_stages on this machine must be at least 1, got 0"):
        local_machine(0)


def test_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.write_text("a file, not a folder")
    store_measurements("x", {"a": 1.0})
    assert load_measurements("x", dict[str, float]) is None


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("IPU_PIPELINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ipu_pipeline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "ipu_pipeline"


def test_profile_times_every_block_and_leaves_the_model_alone() -> None:
    model, batch = TINY["convnext"].build()
    torch.nn.init.ones_(model.classifier.weight)
    captured = capture(model, batch)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    times = profile_blocks(captured, batch, num_devices=2)
    assert times.keys() == {program.name for program in captured.programs}
    assert all(0 < forward_s < 10 and backward_s > 0 for forward_s, backward_s in times.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_one_of_equal_blocks_is_timed_and_known_ones_not_again(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    timed: list[str] = []
    original = blocks_module._measure

    def counting(program, *others):
        timed.append(program.name)
        return original(program, *others)

    monkeypatch.setattr(blocks_module, "_measure", counting)
    model, batch = TINY["bert-qa"].build()
    captured = capture(model, batch)
    first = profile_blocks(captured, batch, num_devices=1)
    visit = ["bert.embeddings", "bert.encoder.layer.0", "qa_outputs", "loss"]
    assert timed == visit * blocks_module.VISITS
    assert first["bert.encoder.layer.0"] == first["bert.encoder.layer.3"]
    assert profile_blocks(captured, batch, num_devices=1) == first
    assert len(timed) == 4 * blocks_module.VISITS
    content = json.loads((cache / "blocks-1x1.json").read_text())
    content["values"] = {key: [1.0] for key in content["values"]}  # damaged: two are needed
    (cache / "blocks-1x1.json").write_text(json.dumps(content))
    profile_blocks(captured, batch, num_devices=1)
    assert len(timed) == 8 * blocks_module.VISITS


def test_devices_have_weights_of_their_own_where_a_block_can_be_copied() -> None:
    model, batch = TINY["vit"].build()
    module = capture(model, batch).programs[1].module
    first, second = blocks_module._one_for_each(module, 2)
    assert first is module
    assert all(a is not b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    module.lock = threading.Lock()
    assert blocks_module._one_for_each(module, 2) == [module, module]


def test_evaluation_has_no_backward_pass() -> None:
    model, batch = TINY["vit"].build()
    captured = capture(model.eval(), batch)
    times = profile_blocks(captured, batch, num_devices=1)
    assert all(backward_s < forward_s for forward_s, backward_s in times.values())


def test_meta_is_refused() -> None:
    model, batch = TINY["vit"].build(device="meta")
    with pytest.raises(CaptureError, match="on the meta device cannot be profiled; load its"):
        profile_blocks(capture(model, batch), batch, num_devices=1)


def test_threads_start_together_and_errors_come_out() -> None:
    before = torch.get_num_threads()
    assert on_threads(lambda: 3, 4) == [3] * 4
    with pytest.raises(ZeroDivisionError):
        on_threads(lambda: 1 // 0, 2)
    assert torch.get_num_threads() == before
