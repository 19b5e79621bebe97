from __future__ import annotations

from dataclasses import replace

from ipu_pipeline.ir.plan import PlannedStage
from ipu_pipeline.ir.text import (
    about_megabytes,
    annotation_lines,
    describe_blocks,
    render_table,
    shortened,
)
from tests.ir.plan_example import example_plan


def test_explain(golden) -> None:
    golden("plan_explain.txt", example_plan().explain() + "\n")


def test_explain_says_what_is_unusual(golden) -> None:
    plan = example_plan()
    one = replace(plan.stages[0], blocks=("embed", "layer.0", "layer.1", "head"), recompute=())
    text = replace(plan, stages=(one,), replicas=2, binding="").explain()
    golden("plan_explain_edited.txt", text + "\n")


def test_runs_of_numbered_blocks_are_joined() -> None:
    names = ["h.0", "h.1", "h.2", "h.4", "g.5", "pooler", "h.9", "h.10"]
    assert shortened(names) == "h.0-2, h.4, g.5, pooler, h.9-10"
    assert shortened([]) == ""
    assert shortened(["3", "h.3.attention"]) == "3, h.3.attention"


def test_annotations_are_spelled_out() -> None:
    plan = example_plan()
    first = replace(plan.stages[0], serialize={"embed": 2}, table_slices={"embed": (0, 1)})
    second = replace(plan.stages[1], table_slices={"embed": (1, 3)})
    assert annotation_lines(replace(plan, stages=(first, second))) == [
        "recomputed: layer.0 (stage 0)",
        "serialized: embed in 2 slices (stage 0)",
        "table split: slice 0 of embed (stage 0); slices 1-2 of embed (stage 1)",
    ]
    assert describe_blocks(first) == "embed .. layer.0 (1 recomputed, 1 serialized)"


def test_describe_blocks() -> None:
    assert describe_blocks(PlannedStage(0, ("bert.encoder.layer.3",))) == "layer.3"
    both = PlannedStage(0, ("a.b.layer.0", "a.b.layer.1"), recompute=("a.b.layer.0",))
    assert describe_blocks(both) == "layer.0 .. layer.1 (1 recomputed)"


def test_megabytes_of_a_message_have_no_exponent_and_no_sign() -> None:
    sizes = (809, 2_854_000, 23_998_000_000, 1.5e12, -398e6)
    assert [*map(about_megabytes, sizes)] == ["0.000809", "2.854", "23998", "1500000", "0"]


def test_a_wide_table_keeps_its_numbers_whole() -> None:
    names, number = ["head", *["milliseconds of a pass"] * 6], "1234567.89"
    text = render_table(names, [["embeddings .. " + "a_long_name" * 9, *[number] * 6]])
    assert text.count(number) == 6
    assert "…" not in text
    first = text.splitlines()[0].index("milliseconds")
    words = "".join(line[:first] for line in text.splitlines()[2:])
    assert words.replace(" ", "") == "embeddings.." + "a_long_name" * 9
