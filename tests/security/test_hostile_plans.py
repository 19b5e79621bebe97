"""A plan is a stranger's file: attacks that worked once, run against what is written from it."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ipu_pipeline.backends.ipu.annotations import annotate
from ipu_pipeline.backends.ipu.bundle import model_parallel_text
from ipu_pipeline.backends.ipu.runtime.device import read_data
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.verify import MAX_NAME
from tests.ir.plan_example import example_plan

QUOTES = 'x"), open("PWNED", "w").write("") or block("y'


def with_name(path: Path, old: str, new: str) -> Path:
    """Write the example plan with every ``old`` (a whole string) replaced by ``new``."""
    example_plan().save(path)
    text = path.read_text(encoding="utf-8")
    assert json.dumps(old) in text
    path.write_text(text.replace(json.dumps(old), json.dumps(new)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name",
    [
        'Bert"""\nopen("PWNED", "w")\n"""',
        "Bert; touch PWNED",
        "Bert\n#SBATCH --wrap=touch",
        "$(touch PWNED)",
        "<!--<script>",
        "",
    ],
)
def test_a_model_class_is_the_name_of_a_class(tmp_path: Path, name: str) -> None:
    path = with_name(tmp_path / "plan.json", "Toy", name)
    with pytest.raises(PlanError, match="must be the name of a class"):
        Plan.load(path)


@pytest.mark.parametrize("name", ["layer\n.0", "layer\x1b[2J", "layer\u2028", "x" * (MAX_NAME + 1)])
def test_names_are_printable(tmp_path: Path, name: str) -> None:
    path = with_name(tmp_path / "plan.json", "layer.0", name)
    with pytest.raises(PlanError, match=r"the plan holds the name .*printable characters"):
        Plan.load(path)


def test_a_block_name_in_a_bundle_is_a_literal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``run.py`` executes holds the name as data, and nothing runs."""
    monkeypatch.chdir(tmp_path)
    plan = Plan.load(with_name(tmp_path / "plan.json", "layer.0", QUOTES))
    text = model_parallel_text(plan, annotate(plan, checkpoint_layers=False))
    found: dict[str, Any] = {}
    exec(compile(text, "model_parallel.py", "exec"), found)
    assert QUOTES in [block["block"] for block in found["BLOCKS"]]
    assert not Path("PWNED").exists()


def test_a_name_in_a_report_ends_no_script(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly (the report extra) is not installed")
    from ipu_pipeline.planner.report.page import page

    name = "</script><script>document.title='PWNED'</script><!--<script>"
    html = page(Plan.load(with_name(tmp_path / "plan.json", "layer.0", name)))
    scripts = re.findall(r"<script", html)
    assert len(scripts) == len(re.findall(r"<script", page(example_plan())))
    assert "<!--" not in html


class Attack:
    """Unpickling it writes a file."""

    def __reduce__(self) -> Any:
        return open, ("PWNED", "w")


@pytest.mark.parametrize("by_torch", [True, False])
def test_rows_for_a_bundle_are_not_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, by_torch: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if by_torch:
        torch.save({"input_ids": Attack()}, "rows.pt")
    else:
        Path("rows.pt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="is no file of tensors"):
        read_data("rows.pt", 1)
    assert not Path("PWNED").exists()
