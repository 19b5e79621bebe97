"""The script for one GPU: every part runs on a CPU in a dry run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_engine
from ipu_pipeline.stages import block_runs


@pytest.mark.acceptance
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_part_runs_and_gives_the_losses_of_plain_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(block_runs, "_BACKEND", "aot_eager")
    written = tmp_path / "found.json"
    found = gpu_engine.main(["--device", "cpu", "--tiny", "--json", str(written)])
    assert json.loads(written.read_text())["runs"] == json.loads(json.dumps(found))
    assert len(found) == 11
    for name, numbers in found.items():
        assert float(numbers.get("loss_difference", 0)) < 8e-3, name


def test_without_a_gpu_it_says_how_to_try_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_engine.main([])
    assert "torch sees no GPU; use --device cpu --tiny for a dry run" in capsys.readouterr().err
