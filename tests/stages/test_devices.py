"""Devices: what a wish means here, what moves, and what an error for want of memory says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.backends.local.runner import run_sequentially
from ipu_pipeline.errors import LoweringError, StageError
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind
from ipu_pipeline.stages.devices import chosen_device, move, moved, naming_snapshots, on_device
from ipu_pipeline.stages.materialize import stand_in

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def accelerator(found: torch.device | None, count: int = 2, index: int = 1) -> object:
    return mock.patch.multiple(
        torch.accelerator,
        current_accelerator=lambda **_: found,
        device_count=lambda: count,
        current_device_index=lambda: index,
    )


def test_none_leaves_weights_where_they_are_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(2, 2)
    with accelerator(None):
        assert chosen_device(None, model) == chosen_device("cpu", model) == CPU
        assert chosen_device(None, model.to("meta")) == CPU
    assert not caplog.text
    with accelerator(CUDA):
        assert chosen_device(None, torch.nn.Linear(2, 2)) == CPU
    assert "the weights of Linear are on the CPU and stay there" in caplog.text
    assert "compile with device='cuda'" in caplog.text


def test_a_type_is_the_present_device_or_that_of_the_local_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = torch.nn.Linear(2, 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with accelerator(CUDA):
        assert chosen_device("cuda", model) == torch.device("cuda", 1)
        assert chosen_device("cuda:0", model, by_local_rank=True) == CUDA
        with pytest.raises(LoweringError, match="LOCAL_RANK is not set, as torchrun does"):
            chosen_device("cuda", model, by_local_rank=True)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert chosen_device("cuda", model, by_local_rank=True) == torch.device("cuda", 1)
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(LoweringError, match="cuda:2 is not here: this machine shows 2"):
            chosen_device("cuda", model, by_local_rank=True)
        with pytest.raises(LoweringError, match="'xpu' is not here: torch finds cuda"):
            chosen_device("xpu", model)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(LoweringError, match="'cuda:3' is not here: torch finds no accelerator"):
        chosen_device("cuda:3", torch.nn.Linear(2, 2))


@pytest.mark.parametrize("wrong", ["meta", "gpu", "cuda:x"])
def test_what_is_no_device_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"device '{wrong}' is unknown; use 'cuda'"):
        ipp.ExecutionOptions(device=wrong)


def test_stand_ins_move_with_the_memory_that_they_have() -> None:
    made = stand_in(torch.empty(300, 200))
    there = moved(made, torch.device("meta"))
    assert there.is_meta
    assert there.stride() == made.stride()
    assert there.untyped_storage().nbytes() == made.untyped_storage().nbytes() < 3000
    plain = torch.ones(3)
    assert moved(plain, CPU) is plain


def test_a_model_moves_once_and_batches_follow() -> None:
    model = torch.nn.BatchNorm1d(3)
    with mock.patch.object(model, "_apply") as apply:
        move(model, None, CPU)
        apply.assert_not_called()
    move(model, torch.optim.AdamW(model.parameters()), torch.device("meta"))
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    batch = {"x": torch.ones(2), "n": 3}
    assert on_device(batch, CPU)["x"] is batch["x"]
    there = on_device(batch, torch.device("meta"))
    assert there["x"].is_meta
    assert there["n"] == 3


@pytest.mark.parametrize("writes", [True, False])
def test_want_of_memory_names_stage_block_microbatch_and_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, writes: bool
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))

    def dump(path: str) -> None:
        if not writes:
            raise RuntimeError("no CUDA here")
        Path(path).write_bytes(b"snapshot")

    def work(action: SimpleNamespace) -> None:
        try:
            with naming_snapshots():
                if action.kind == "B":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        except Exception as error:
            error.pipeline_block = "layer.7"  # type: ignore[attr-defined]
            raise

    schedule = schedule_kind("1f1b").rows(PipelineShape.of(2, 3))
    with (
        mock.patch.object(torch.cuda.memory, "_dump_snapshot", dump),
        pytest.raises(StageError) as caught,
    ):
        run_sequentially(schedule, work)
    text = str(caught.value)
    assert "stage 1 failed in block 'layer.7' (backward pass of microbatch 0)" in text
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB" in text
    found = list(tmp_path.glob("ipu-pipeline-oom-rank3-*.pickle"))
    assert bool(found) == writes
    if writes:
        assert f"a snapshot of the memory is in {found[0]}" in text
    else:
        assert "a snapshot of the memory could not be written (no CUDA here)" in text
