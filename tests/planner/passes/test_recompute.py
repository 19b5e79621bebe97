from __future__ import annotations

import pytest

from ipu_pipeline.errors import PlanError
from ipu_pipeline.planner.passes.annotations import Recompute
from ipu_pipeline.planner.passes.manager import pass_text
from tests.planner.passes.plans import NAMES, before_and_after, table_plan


def test_plan_text(golden) -> None:
    one, plan = Recompute(("enc", "*.layer.1")), table_plan()
    golden("pass_recompute.txt", before_and_after(plan, pass_text(one), one.run(plan)))


def test_words() -> None:
    plan = table_plan()
    everything = Recompute("all").run(plan)
    assert [name for s in everything.stages for name in s.recompute] == list(NAMES[:-1])
    assert Recompute("auto").run(everything) == everything
    assert Recompute("none").run(everything) == plan


def test_exactly_the_named_blocks_recompute() -> None:
    plan = Recompute(("dec.layer", "loss")).run(Recompute("all").run(table_plan()))
    assert [s.recompute for s in plan.stages] == [(), ("dec.layer.0",), ("dec.layer.1",)]


def test_refusals() -> None:
    with pytest.raises(PlanError, match="recompute names lair, which the plan does not have; its"):
        Recompute(("lair",)).run(table_plan())
    with pytest.raises(ValueError, match=r"recompute: blocks is 'head'; use auto, .* \[head\]"):
        Recompute("head")
    with pytest.raises(ValueError, match="recompute: blocks is 3; give a list"):
        Recompute(3)  # type: ignore[arg-type]
