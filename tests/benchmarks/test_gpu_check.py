"""The check of GPU prices on one GPU: the whole flow with a tiny model, where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_rows import UnjudgedRowError, machine_of


def test_a_dry_run_says_that_nothing_was_measured_on_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "CASES", gpu_check.CASES[2:])
    path = tmp_path / "found.json"
    assert gpu_check.main(["--dry-run", "--steps", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert "nothing was measured on a GPU" in capsys.readouterr().out
    assert (found["machine"], found["measured_on_gpu"]) == ("h200-x1", False)
    by_what = {one["what"]: one for one in found["figures"]}
    assert {"layer forward", "layer backward", "step", "peak memory"} <= set(by_what)
    assert all(one["predicted"] > 0 and one["error"] is None for one in found["figures"])
    assert by_what["layer backward"]["measured"] > 0
    assert by_what["peak memory"]["measured"] is None


def test_the_layers_add_up_to_no_more_than_the_step_on_the_real_sizes() -> None:
    case = gpu_check.CASES[2]
    plan = gpu_check.predicted(*gpu_check.built(case, "meta", dry=False), "h200")
    measured = {
        (b.name, which): 1.0
        for b in plan.graph.blocks
        if b.kind == "layer"
        for which in ("forward", "backward")
    }
    forward, backward = gpu_check._block_figures(case.name, plan, measured)
    of_layers = 16 * gpu_check.MICROBATCHES * (forward.predicted + backward.predicted) / 1e3
    assert 0.5 * plan.objective_s < of_layers < plan.objective_s
    # 1.24 billion elements: weights, gradients, AdamW with a float32 copy.
    assert plan.stages[0].memory_bytes > 18 * 1.23e9


def test_without_a_gpu_and_with_wrong_numbers_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "there is no GPU here; --dry-run runs the flow" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.main(["--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
    assert machine_of("NVIDIA H200") == "h200"
    with pytest.raises(UnjudgedRowError, match="GPU 'Tesla K80' is not described"):
        machine_of("Tesla K80")
