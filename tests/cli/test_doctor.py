from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from ipu_pipeline.cli import app, doctor
from ipu_pipeline.ops import extension, linear
from ipu_pipeline.ops.extension import ExtensionState
from ipu_pipeline.planner.backend import backend_named


def test_doctor_names_versions_and_targets() -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["doctor"])
    assert result.exit_code == 0
    for word in (
        "torch",
        "transformers",
        "usable cores",
        "kernels",
        "local",
        "distributed",
        "poptorch",
    ):
        assert word in result.output


def state(target: str) -> tuple[str, str]:
    return backend_named(target).doctor()


def test_local_target_is_ready() -> None:
    assert state("local")[0] == "ready"


def test_missing_sdk_says_where_it_comes_from() -> None:
    assert state("poptorch") == (
        "unavailable",
        "set IPU_PIPELINE_SDK_PYTHON to the Python of Graphcore's SDK",
    )


@pytest.mark.parametrize(
    ("available", "gloo", "expected"),
    [
        (False, False, "this torch was built without torch.distributed"),
        (True, False, "torch.distributed has neither gloo nor a usable nccl"),
        (True, True, "processes under torchrun, over gloo"),
    ],
)
def test_distributed_backends(monkeypatch, available: bool, gloo: bool, expected: str) -> None:
    import torch.distributed

    monkeypatch.setattr(torch.distributed, "is_available", lambda: available)
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: gloo)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert state("distributed")[1] == expected


def test_memory_is_unknown_where_the_kernel_does_not_say(monkeypatch) -> None:
    monkeypatch.delattr("os.sysconf")
    assert ("memory", "unknown") in doctor._machine()


# ---------------------------------------------------------------- kernels


def kernels(monkeypatch, state: ExtensionState) -> list[tuple[str, str]]:
    monkeypatch.setattr(extension, "state", lambda: state)
    monkeypatch.setattr(extension, "operators", lambda: ("adamw_step", "dropout_counter"))
    return doctor._kernels()


@pytest.mark.parametrize("threaded", [True, False])
def test_kernels_that_can_be_used(monkeypatch, threaded: bool) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(linear, "onednn_products", lambda: threaded)
    monkeypatch.setattr(linear, "widens_bfloat16", lambda: not threaded)
    state = ExtensionState(
        usable=True,
        detail="/there/_kernels.so",
        built_for="2.13.0",
        instruction_set="avx2",
        threaded=threaded,
    )
    assert kernels(monkeypatch, state) == [
        ("library", "ready"),
        ("file", "/there/_kernels.so"),
        ("compiled against", "torch 2.13.0"),
        ("instruction set", "avx2"),
        ("float32 products", "oneDNN" if threaded else "MKL, or what torch uses here"),
        ("bfloat16 products", "torch's own" if threaded else "in float32, rounded once"),
        ("threads", "3" if threaded else "1 (compiled without OpenMP)"),
        ("operators", "adamw_step, dropout_counter"),
    ]


def test_kernels_that_are_not_used_say_why_in_full(monkeypatch) -> None:
    reason = "not built: " + " ".join(f"word{i}" for i in range(40))
    rows = kernels(monkeypatch, ExtensionState(usable=False, detail=reason))
    assert rows[0] == ("library", "not used; everything runs on plain torch")
    assert rows[-1] == ("compiled against", "unknown")
    assert rows[1][0] == "why not"
    assert " ".join(text for _, text in rows[1:-1]) == reason
    monkeypatch.setattr(doctor, "_machine", list)
    for _, text in rows:
        assert text in doctor.report()
