"""Which blocks a wish for recomputation means."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.block_runs import recomputed_blocks
from tests.tiny_models import TINY


@pytest.fixture(scope="module")
def plan() -> ipp.Plan:
    model, example = TINY["bert-qa"].build()
    made = ipp.plan(model, example, num_stages=2, microbatches=2, granularity="sublayer")
    first = replace(made.stages[0], recompute=made.stages[0].blocks[:1])
    return replace(made, stages=(first, *made.stages[1:]))


def names(plan: ipp.Plan) -> list[str]:
    return [name for stage in plan.stages for name in stage.blocks]


def test_words(plan: ipp.Plan) -> None:
    assert recomputed_blocks(None, plan) == {names(plan)[0]}
    assert recomputed_blocks("all", plan) == set(names(plan))
    assert recomputed_blocks("none", plan) == frozenset()


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (["bert.embeddings"], {"bert.embeddings"}),
        (["bert.encoder.layer.1"], {n for n in range(1, 2)}),
        (["bert.encoder.layer.[12].*"], {1, 2}),
        (["*.layer.3.*", "bert.encoder.layer.0"], {0, 3}),
        ([], set()),
    ],
)
def test_names_prefixes_and_patterns(
    plan: ipp.Plan, wish: list[str], expected: set[str | int]
) -> None:
    wanted = {
        name
        for name in names(plan)
        if name in expected or any(f"layer.{n}." in name for n in expected)
    }
    assert wanted or not wish
    assert recomputed_blocks(wish, plan) == wanted


def test_a_prefix_is_whole_words(plan: ipp.Plan) -> None:
    blocks = ("layer.1", "layer.10", "shared", "shared#2")
    stages = (replace(plan.stages[0], blocks=blocks),)
    small = replace(plan, stages=stages)
    assert recomputed_blocks(["layer.1"], small) == {"layer.1"}
    assert recomputed_blocks(["shared"], small) == {"shared"}


def test_unknown_names_are_refused(plan: ipp.Plan) -> None:
    with pytest.raises(
        LoweringError, match=r"recompute names 'lm_head', 'x\*'.* the blocks are bert.embeddings"
    ):
        recomputed_blocks(["lm_head", "bert.embeddings", "x*"], plan)


def test_the_compiler_refuses_them_too(plan: ipp.Plan) -> None:
    model, _ = TINY["bert-qa"].build()
    with pytest.raises(LoweringError, match="recompute names 'encoder'"):
        ipp.compile(model, plan, recompute=["encoder"])


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="recompute 'some' is unknown; use 'all', 'none', None"):
        ipp.stages.executable.ExecutionOptions(recompute="some")
    assert torch is not None
