"""The text form of passes, their order, and the verifier between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipu_pipeline.errors import PlanError, VerifyError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.passes.annotations import (
    Recompute,
    SerializeEmbedding,
    SerializeProjection,
)
from ipu_pipeline.planner.passes.manager import ORDER, PassManager, available_passes
from tests.planner.passes.plans import NAMES, table_plan

WORDS = st.text(st.characters(codec="ascii", exclude_characters="'", categories=["L", "N", "P"]))
FACTORS = st.integers(1, 9)
PATTERNS = st.lists(WORDS, max_size=3).map(tuple)
ANY_PASS = st.one_of(
    st.builds(SerializeEmbedding, FACTORS, blocks=PATTERNS),
    st.lists(FACTORS, min_size=1, max_size=3).map(
        lambda splits: SerializeEmbedding(sum(splits), tuple(splits))
    ),
    st.builds(SerializeProjection, FACTORS, PATTERNS),
    st.builds(Recompute, st.sampled_from(["auto", "all", "none"]) | PATTERNS),
)


@given(st.lists(ANY_PASS, max_size=4))
def test_text_reads_back(passes) -> None:
    text = str(PassManager(tuple(passes)))
    read = PassManager.parse(text)
    assert sorted(map(str, passes)) == sorted(map(str, read.passes))
    assert [ORDER.index(one.name) for one in read.passes] == sorted(
        ORDER.index(one.name) for one in passes
    )
    assert PassManager.parse(str(read)) == read


def test_text_form() -> None:
    text = "recompute{blocks=[a.b,'c.[0-2]']}, serialize_embedding{ factor=4, splits=[2,2] }"
    manager = PassManager.parse(text)
    assert manager.passes == (
        SerializeEmbedding(4, splits=(2, 2)),
        Recompute(("a.b", "c.[0-2]")),
    )
    assert str(manager) == (
        "serialize_embedding{factor=4,splits=[2,2]},recompute{blocks=[a.b,'c.[0-2]']}"
    )
    assert PassManager.parse(" ") == PassManager()
    assert PassManager.parse("recompute,recompute{}").passes == (Recompute(), Recompute())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inline", "unknown pass 'inline'; passes: offload, recompute, serialize_emb"),
        ("recompute{level=2}", "pass recompute has no option level; its options: blocks"),
        (
            "serialize_embedding",
            "pass serialize_embedding misses the option factor: serialize_embedding{",
        ),
        ("recompute{blocks=all", "expected , or }, found 'the end'"),
        ("recompute}", "expected ,, found '}'"),
        ("recompute{=2}", "expected a word, found '='"),
        ("recompute{blocks}", "expected =, found '}'"),
        ("recompute{blocks=[a b]}", r"expected , or \], found 'b'"),
        ("recompute{blocks=a,blocks=b}", "recompute is given blocks twice"),
        ("serialize_projection{factor=two}", "factor must be a whole number, got 'two'"),
    ],
)
def test_other_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PassManager.parse(text)


def test_passes_run_in_the_default_order() -> None:
    assert set(ORDER) == set(available_passes())
    manager = PassManager.parse(
        "recompute{blocks=all},serialize_embedding{factor=2},serialize_embedding{factor=3}"
    )
    assert [one.name for one in manager.passes] == [*["serialize_embedding"] * 2, "recompute"]
    plan = manager.run(table_plan())
    assert plan.stages[0].serialize == {"enc.embed": 3}
    assert plan.stages[0].recompute == NAMES[:3]


@dataclass(frozen=True)
class Misplace:
    """Annotates a block that its stage does not hold."""

    name: ClassVar[str] = "misplace"

    def run(self, plan: Plan) -> Plan:
        first = replace(plan.stages[0], recompute=("loss",))
        return replace(plan, stages=(first, *plan.stages[1:]))


def test_a_pass_that_breaks_the_plan_is_named() -> None:
    manager = PassManager((Recompute("all"), Misplace(), Recompute("none")))
    with pytest.raises(VerifyError, match=r"pass misplace left an invalid plan: stage 0 annotates"):
        manager.run(table_plan())


def test_an_invalid_plan_is_the_callers() -> None:
    with pytest.raises(PlanError, match="stage 0 annotates blocks it does not hold: loss"):
        PassManager((Recompute("none"),)).run(Misplace().run(table_plan()))


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.builds(SerializeEmbedding, FACTORS, blocks=st.just(("dec.embed",)) | st.just(())),
            st.sampled_from([(1, 2), (3, 1), (2,)]).map(
                lambda splits: SerializeEmbedding(sum(splits), splits, ("dec.embed",))
            ),
            st.builds(SerializeProjection, FACTORS, st.sampled_from([(), ("head", "enc.layer.1")])),
            st.builds(
                Recompute,
                st.sampled_from(["auto", "all", "none", ("enc",), ("*.layer.1", "head")]),
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_running_passes_again_changes_nothing(passes) -> None:
    for one in passes:
        once = one.run(table_plan())
        assert one.run(once) == once
    manager = PassManager(tuple(passes))
    annotated = manager.run(table_plan())
    assert annotated.blocks == table_plan().blocks
    assert [s.blocks for s in annotated.stages] == [s.blocks for s in table_plan().stages]
    assert passes[-1].run(annotated) == annotated
    distinct = {one.name: one for one in passes}
    settled = PassManager(tuple(distinct.values()))
    assert settled.run(settled.run(table_plan())) == settled.run(table_plan())
