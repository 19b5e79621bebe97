"""A plan is a stranger's file: attacks that worked once, run against what is written from it."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ipu_pipeline.backends.ipu.annotations import annotate
from ipu_pipeline.backends.ipu.bundle import model_parallel_text
from ipu_pipeline.backends.ipu.runtime.device import read_data
from ipu_pipeline.capture.from_config import load_config
from ipu_pipeline.errors import CaptureError, PipelineError, PlanError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.verify import MAX_NAME
from ipu_pipeline.planner.report.page import page
from ipu_pipeline.planner.report.text import drawn, simulation_text
from ipu_pipeline.planner.schedules.simulate import simulate
from tests.ir.plan_example import example_plan
from tests.security.kind import ipu_plan

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
    with pytest.raises(
        PlanError, match=r"must be the name of a class|is not of printable characters"
    ):
        Plan.load(path)


def test_a_program_of_ipus_has_the_ranges_of_its_configuration(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    ipu_plan().save(path)
    plan = json.loads(path.read_text(encoding="utf-8"))
    plan["settings"]["proportions"][0] = -1
    path.write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(PlanError, match=r"plan\.json: .*proportions\[0\]: Expected `float` >= 0"):
        Plan.load(path)


@pytest.mark.parametrize("name", ["layer\n.0", "layer\x1b[2J", "layer\u2028", "x" * (MAX_NAME + 1)])
def test_names_are_printable(tmp_path: Path, name: str) -> None:
    path = with_name(tmp_path / "plan.json", "layer.0", name)
    with pytest.raises(PlanError, match=r"holds the .*printable characters"):
        Plan.load(path)


def test_a_block_name_in_a_bundle_is_a_literal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``run.py`` executes holds the name as data, and nothing runs."""
    monkeypatch.chdir(tmp_path)
    plan = Plan.load(with_name(tmp_path / "plan.json", "layer.0", QUOTES))
    text = model_parallel_text(plan, annotate(plan))
    found: dict[str, Any] = {}
    exec(compile(text, "model_parallel.py", "exec"), found)
    assert QUOTES in [block["block"] for block in found["BLOCKS"]]
    assert not Path("PWNED").exists()


def test_a_name_in_a_report_ends_no_script(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly (the report extra) is not installed")
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
    with pytest.raises(
        ValueError, match=r"is no file of tensors.* or holds more than tensors"
    ) as told:
        read_data("rows.pt", 1)
    assert "weights_only" not in str(told.value)  # torch's remedy is to run what is in there
    assert not Path("PWNED").exists()


TEXTS = {
    "terminal": "\x1b]0;PWNED\x07\x1b[2J\r\x9b",
    "lines and direction": "a\nb\u2028\u202e",
    "page": "</script><!--<script>alert(1)</script>",
    "markup of a console": "[/x][link=file:///etc]a[/link]:warning:",
}


def texts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the places of all texts in a plan, of equal ones in lists the first; keys with None."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, list):
        for index, inner in enumerate(value[:1]):
            yield from texts(inner, (*path, index))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key, None)
            yield from texts(inner, (*path, key))


def replaced(plan: Any, path: tuple[Any, ...], text: str) -> Any:
    plan = copy.deepcopy(plan)
    *way, last = path if path[-1] is not None else path[:-1]
    owner = plan
    for key in way:
        owner = owner[key]
    if path[-1] is None:
        owner[text] = owner.pop(last)
    else:
        owner[last] = text
    return plan


@pytest.mark.parametrize("kind", TEXTS)
def test_no_text_of_a_plan_acts_where_it_is_shown(tmp_path: Path, kind: str) -> None:
    path, text = tmp_path / "plan.json", TEXTS[kind]
    example_plan().save(path)
    good = json.loads(path.read_text(encoding="utf-8"))
    worst = good
    for place in texts(good):
        path.write_text(json.dumps(replaced(good, place, text)), encoding="utf-8")
        shown = []
        try:
            plan = Plan.load(path)
            timeline = simulate(plan)
            shown += [plan.explain(), simulation_text(plan, timeline), drawn(plan, timeline)]
            worst = replaced(worst, place, text)
        except PipelineError as error:
            shown.append(str(error))
        assert all(part.replace("\n", "").isprintable() for part in shown), place
    if worst is not good:
        pytest.importorskip("plotly", reason="plotly (the report extra) is not installed")
        path.write_text(json.dumps(worst), encoding="utf-8")
        html = page(Plan.load(path))
        assert html.count("<script") == page(example_plan()).count("<script")
        assert "<!--" not in html


def test_code_beside_a_config_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("open('PWNED', 'w')\n", encoding="utf-8")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CaptureError, match="no transformers config"):
        load_config(tmp_path)
    assert not Path("PWNED").exists()
