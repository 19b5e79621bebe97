from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir import plan as plan_module
from ipu_pipeline.ir.graph import OpRecord
from ipu_pipeline.ir.plan import (
    ModelIdentity,
    Plan,
    PlannedStage,
    library_versions,
)
from ipu_pipeline.ir.verify import verify_plan
from ipu_pipeline.planner.price import price, priced
from ipu_pipeline.planner.schedules.simulate import simulate
from tests.ir.plan_example import example_graph, example_plan


def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    path = tmp_path / "plan.json"
    example_plan().save(path)
    return path, json.loads(path.read_text())


def rewritten(path: Path, raw: Any) -> Path:
    path.write_text(json.dumps(raw))
    return path


def test_save_and_load_give_the_same_plan(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    loaded = Plan.load(path)
    assert loaded == example_plan()
    assert not loaded.edited
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_numbers_of_the_plan() -> None:
    plan = example_plan()
    assert (plan.num_stages, plan.micro_batch_size, plan.total_batch_size) == (2, 4, 16)
    assert (plan.objective_s, plan.lower_bound_s) == (0.030, 0.027)
    assert plan.gap == pytest.approx(0.1)
    assert replace(plan, objective_s=0.0).gap == 0.0
    assert replace(plan, lower_bound_s=0.031).gap == 0.0
    assert plan.stage_of == {"embed": 0, "layer.0": 0, "layer.1": 1, "head": 1}


def test_hand_edited_stage_list_loads_and_says_so(tmp_path: Path) -> None:
    path, raw = saved(tmp_path)
    raw["stages"][0]["blocks"] = ["embed"]
    raw["stages"][0]["recompute"] = []
    raw["stages"][1]["blocks"] = ["layer.0", "layer.1", "head"]
    plan = Plan.load(rewritten(path, raw))
    assert plan.edited
    assert plan.stage_of["layer.0"] == 1
    assert "edited by hand; these numbers are those of the edited plan" in plan.explain()


def test_an_edited_plan_is_priced_again_on_load(tmp_path: Path) -> None:
    made = priced(replace(example_plan(), decision_digest="", lower_bound_s=0.0), 0.0001)
    made.save(tmp_path / "plan.json")
    raw = json.loads((tmp_path / "plan.json").read_text())
    raw["stages"][0]["blocks"] = ["embed"]
    raw["stages"][0]["recompute"] = []
    raw["stages"][1]["blocks"] = ["layer.0", "layer.1", "head"]
    plan = Plan.load(rewritten(tmp_path / "plan.json", raw))
    assert plan.objective_s == price(plan).step_s == simulate(plan).step_s != made.objective_s
    assert plan.stages[1].memory_bytes > made.stages[1].memory_bytes
    assert plan.lower_bound_s == made.lower_bound_s  # over the same run: it still is a bound
    raw["num_microbatches"] = 5
    other = Plan.load(rewritten(tmp_path / "plan.json", raw))
    assert (other.lower_bound_s, other.edited) == (0.0, True)
    assert "no lower bound is known" in other.explain()


def test_an_edited_plan_that_does_not_fit_says_so(tmp_path: Path) -> None:
    path, raw = saved(tmp_path)
    for device in raw["machine"]["devices"]:
        device["memory_bytes"] = 1000
    plan = Plan.load(rewritten(path, raw))
    assert re.search(
        r"DOES NOT FIT: d0 needs .* MB of 0.0 MB; the fullest stage is 0", plan.explain()
    )


@pytest.mark.parametrize(
    ("field", "value"), [("num_microbatches", 5), ("schedule", "gpipe"), ("replicas", 2)]
)
def test_every_decision_counts_as_an_edit(field: str, value: Any) -> None:
    assert replace(example_plan(), **{field: value}).edited


def test_a_new_prediction_is_no_edit() -> None:
    assert not replace(example_plan(), objective_s=1.0).edited


# ---- refusals of plan.py ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the plan"),
        ("[]", "is not a plan: it has no schema_version"),
        ("{}", "is not a plan: it has no schema_version"),
        ('{"schema_version": 9}', "plan schema version 9, this library reads 2; make the plan"),
        ('{"schema_version": 2}', "missing field 'model', 'machine', 'stages', 'graph', 'num_mi"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def test_truncated_and_missing_files_are_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(PlanError, match=r"cannot read the plan .*plan.json: "):
        Plan.load(path)
    with pytest.raises(PlanError, match=r"cannot read the plan .*none.json: "):
        Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (lambda raw: raw, r"plan\.json: unknown field 'colour'; fields: model, machine"),
        (lambda raw: raw["stages"][0], r"plan\.json, stages\[0\]: unknown field 'colour'"),
        (lambda raw: raw["graph"]["blocks"][0], r"graph, blocks\[0\]: unknown field 'colour'"),
        (lambda raw: raw["machine"]["devices"][1], r"machine\.devices\[1\]: unknown field 'colo"),
    ],
)
def test_unknown_field_is_refused_by_name(tmp_path: Path, place, message: str) -> None:
    path, raw = saved(tmp_path)
    place(raw)["colour"] = "red"
    with pytest.raises(PlanError, match=message):
        Plan.load(rewritten(path, raw))


def test_text_in_place_of_a_block_list_is_refused(tmp_path: Path) -> None:
    path, raw = saved(tmp_path)
    raw["stages"][0]["blocks"] = "embed"
    with pytest.raises(
        PlanError, match=r"stages\[0\]\.blocks: Expected `array`, got `str`, the value is 'embed'"
    ):
        Plan.load(rewritten(path, raw))


def test_other_library_version_is_refused_with_the_difference(tmp_path: Path) -> None:
    path, raw = saved(tmp_path)
    raw["versions"]["transformers"] = "1.2.3"
    installed = library_versions()["transformers"]
    with pytest.raises(PlanError, match=rf"transformers: plan 1\.2\.3, installed {installed}"):
        Plan.load(rewritten(path, raw))
    assert Plan.load(path, any_version=True).versions["transformers"] == "1.2.3"
    raw["versions"] = {"torch": "0.1"}
    with pytest.raises(PlanError, match="ipu-pipeline: plan unknown, installed"):
        Plan.load(rewritten(path, raw))


def test_other_torch_version_is_accepted(tmp_path: Path) -> None:
    path, raw = saved(tmp_path)
    raw["versions"]["torch"] = "0.1"
    assert Plan.load(rewritten(path, raw)).versions["torch"] == "0.1"


def test_library_that_is_not_installed_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "RECORDED_LIBRARIES", ("no-such-library-here",))
    assert library_versions() == {"no-such-library-here": "not installed"}


def test_other_model_is_refused_with_the_difference_spelled_out() -> None:
    plan = example_plan()
    plan.check_model(ModelIdentity("Toy", dict(plan.model.parameters)))
    other = ModelIdentity("Tay", {"embed.weight": "11x8 float32", "new.bias": "8 float32"})
    with pytest.raises(PlanError, match="made for another model") as caught:
        plan.check_model(other)
    message = str(caught.value)
    assert "class: plan Toy, model Tay" in message
    assert "embed.weight: plan 10x8 float32, model 11x8 float32" in message
    assert "layer.0.weight: plan 8x8 float32, model absent" in message
    assert "new.bias: plan absent, model 8 float32" in message
    assert plan.model.fingerprint in message
    assert other.fingerprint in message


def test_long_differences_are_cut() -> None:
    other = ModelIdentity("Toy", {f"p{index}": "2 float32" for index in range(20)})
    with pytest.raises(PlanError, match=r"\.\.\. and 14 more"):
        example_plan().check_model(other)


# ---- refusals of verify.py ----------------------------------------------------------------


def with_stages(*blocks: tuple[str, ...], **fields: Any) -> Plan:
    stages = tuple(PlannedStage(index, names, **fields) for index, names in enumerate(blocks))
    return replace(example_plan(), stages=stages)


GOOD = (("embed", "layer.0"), ("layer.1", "head"))
REFUSED: list[tuple[Plan, str]] = [
    (with_stages(), "the plan has no stage"),
    (replace(example_plan(), num_microbatches=0), "num_microbatches must be at least 1, got 0"),
    (replace(example_plan(), num_microbatches=True), "must be a whole number, got True"),
    (replace(example_plan(), replicas=1.5), "replicas must be a whole number, got 1.5"),
    (with_stages(*GOOD, ()), r"stage 2 is on device 2, but machine 'toy' has devices 0 to 1"),
    (replace(example_plan(), stages=(replace(example_plan().stages[0], device="0"),)),
     "stage 0 is on device '0'"),
    (with_stages(("embed", "layer.0"), ("layer.1", "head", "tail")), "the model has not: tail"),
    (with_stages(("embed",), ("layer.1", "head")), r"in no stage: layer\.0; add each to one"),
    (with_stages(("embed", "layer.0", "layer.1"), ("layer.1", "head")), r"several.*: layer\.1;"),
    (with_stages((), ("embed", "layer.0", "layer.1", "head")), "stage 0 holds no block"),
    (with_stages(("layer.0", "embed"), ("layer.1", "head")), "out of execution order"),
    (with_stages(("layer.0", "layer.1", "head"), ("embed",)),
     r"'layer\.0' in stage 0 needs 'e' of block 'embed', which is in the later stage 1; move"),
    (with_stages(*GOOD, recompute=("layer.1",)), r"stage 0 annotates .* not hold: layer\.1"),
    (with_stages(("embed", "layer.0", "layer.1", "head"), serialize={"head": 0}),
     "slices of block 'head' must be at least 1, got 0"),
    (with_stages(("embed", "layer.0", "layer.1", "head"), serialize={"head": "2"}),
     "slices of block 'head' must be a whole number, got '2'"),
    (replace(example_plan(), graph=replace(example_graph(), blocks=example_graph().blocks[:3]),
             stages=with_stages(("embed", "layer.0", "layer.1")).stages),
     "tensors name blocks .* has not: head"),
    (replace(with_stages(("embed", "layer.1", "layer.0", "head")), graph=replace(
        example_graph(), blocks=tuple(example_graph().blocks[i] for i in (0, 2, 1, 3)))),
     r"'h0' goes from block 'layer\.0' to 'layer\.1', which does not run later; list the graph's"),
]  # fmt: skip


def test_good_plans_pass() -> None:
    verify_plan(example_plan())
    verify_plan(with_stages(*GOOD, serialize={}))
    verify_plan(with_stages(("embed", "layer.0", "layer.1", "head")))


@pytest.mark.parametrize(("plan", "message"), REFUSED, ids=[text for _, text in REFUSED])
def test_broken_plan_is_refused_by_name(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        verify_plan(plan)


# ---- tables and slices --------------------------------------------------------------------


def with_table(factor: int = 4, **slices: tuple[int, int]) -> Plan:
    """``layer.1`` in stage 1 is cut; ``s0``, ``s1``: what the stages hold of its table."""
    lookup = OpRecord("aten.embedding", "gather", "float16", ((8, 8), (4, 3)), 0, 128)
    graph = example_graph()
    blocks = tuple(
        replace(block, forward_ops=(lookup,)) if block.name == "layer.1" else block
        for block in graph.blocks
    )
    plan = replace(example_plan(), graph=replace(graph, blocks=blocks))
    stages = [
        replace(stage, table_slices={"layer.1": slices[f"s{i}"]} if f"s{i}" in slices else {})
        for i, stage in enumerate(plan.stages)
    ]
    stages[1] = replace(stages[1], serialize={"layer.1": factor})
    return replace(plan, stages=tuple(stages))


def test_tables_and_slices_are_saved_and_are_decisions(tmp_path: Path) -> None:
    plan = priced(replace(with_table(s0=(0, 1), s1=(1, 4)), decision_digest=""))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.digest() != with_table().digest() != with_table(5).digest()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            with_table(s0=(0, 4)),
            r"slices of 'layer\.1' are in stages \[0\]; they must be in consec",
        ),
        (with_table(s0=(0, 1), s1=(2, 4)), r"the stages hold slices 0 to 1, 2 to 4 of 'layer\.1'"),
        (with_table(s0=(0, 2), s1=(2, 3)), r"of 'layer\.1', which has 4; together they must hold"),
        (with_table(s0=(0, 0), s1=(0, 4)), "each stage at least one"),
    ],
)
def test_impossible_slices_are_refused(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        verify_plan(plan)


def test_slices_of_no_block_are_refused() -> None:
    plan = example_plan()
    first = replace(plan.stages[0], table_slices={"nope": (0, 1)})
    with pytest.raises(PlanError, match="stage 0 holds slices of 'nope', which no stage runs"):
        verify_plan(replace(plan, stages=(first, plan.stages[1])))


def test_malformed_slices_are_refused(tmp_path: Path) -> None:
    path, raw = saved(tmp_path)
    raw["stages"][0]["table_slices"] = {"embed": [0, "x"]}
    with pytest.raises(
        PlanError, match=r"stages\[0\]\.table_slices\[\.\.\.\]\[1\]: Expected `int`, got `str`"
    ):
        Plan.load(rewritten(path, raw))
