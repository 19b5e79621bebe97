"""The table of plans for mixtures of experts."""

from __future__ import annotations

import pytest

from benchmarks import gpu_plans


@pytest.mark.acceptance
def test_a_plan_of_real_size_keeps_its_bound(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_plans.main(["--models", "gpt-oss-20b", "DeepSeek-V3", "--gpus", "64"])
    first, second = capsys.readouterr().out.splitlines()[2:]
    name, gpus, sizes, *_, gap, _ = [cell.strip() for cell in first.split("|")][1:]
    assert (name, gpus) == ("gpt-oss-20b", "64")
    assert "dp" in sizes
    assert 0 <= float(gap.rstrip("%")) < 40
    assert second.startswith("| DeepSeek-V3 | 64 | does not fit |")
