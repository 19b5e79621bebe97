"""Tables whose rows are on several IPUs: placed, priced, written, and equal to the local target."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.annotations import annotate
from ipu_pipeline.backends.ipu.prices import predict
from ipu_pipeline.backends.ipu.settings import ipu_config_of_plan
from ipu_pipeline.errors import LoweringError
from tests.backends.ipu.emulated import Case, adamw, assert_same_weights, case, sessions_of, sgd

pytestmark = pytest.mark.usefixtures("poptorch")
EVEN = {"vocab_size": 102}  # the tables of the tiny models have 99 rows


def _case(name: str, embedding: tuple[int, ...], projection: Any = None, **config: Any) -> Case:
    return case(
        name, changes=EVEN, layers=(0, 2, 2), gradient_accumulation_steps=13,
        serialized_embedding_splits_per_ipu=embedding,
        serialized_projection_splits_per_ipu=projection, **config,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "splits", "devices"),
    [
        # a head of its own: its first rows come back behind the last layer
        ("gpt-neox", ((1, 1, 0), (0, 1, 2)), [0, 1, 2, 1, 2]),
        pytest.param("bert-mlm", ((1, 1, 0),), [0, 1, 2, 0, 1], marks=pytest.mark.acceptance),
        # encoder and decoder look up in one table
        pytest.param("t5", ((1, 1, 0),), [0, 1, 0, 1, 2, 0, 1], marks=pytest.mark.acceptance),
    ],
)
def test_spread_tables_train_as_whole_ones(name: str, splits: Any, devices: list[int]) -> None:
    made = _case(name, *splits)
    assert [stage.device for stage in made.plan.stages] == devices
    with made.local(sgd) as local:
        device = made.compile(sgd)
        ours, theirs = (one.train_step(made.batch()).loss for one in (device, local))
        assert ours == pytest.approx(theirs, abs=1e-6)
        variables = sessions_of(device).training.program.ipus_of_variables()
        parts = [ipus for name, ipus in variables.items() if ".weight_" in name]
        assert len(parts) == sum(len([c for c in counts if c]) for counts in splits)
        assert all(len(ipus) == 1 for ipus in parts)
        device.close()
        assert_same_weights(made.model, local.model)


def test_state_of_spread_tables_goes_both_ways() -> None:
    """GPT-2's head is its embedding: both shares come back to their IPUs."""
    made = _case("gpt2-lm", (2, 1, 0), recompute_checkpoint_every_layer=True)
    assert [stage.device for stage in made.plan.stages] == [0, 1, 2, 0, 1]
    optimizer = adamw(made.model)
    with made.local(adamw) as local:
        for seed in range(2):  # the second program begins with the state of the first
            device = made.compile(lambda _: optimizer)
            ours, theirs = (one.train_step(made.batch(seed)).loss for one in (device, local))
            assert ours == pytest.approx(theirs, abs=1e-6)
            device.fetch_optimizer()
            results = [one.eval_step(made.batch(7)).outputs["logits"] for one in (device, local)]
            torch.testing.assert_close(*results, rtol=0, atol=1e-5)
            device.close()
        assert_same_weights(made.model, local.model)
        for ours, theirs in zip(
            made.model.parameters(), local.model.parameters(), strict=True
        ):  # the table among them, as one
            for key in ("exp_avg", "exp_avg_sq", "step"):
                left, right = optimizer.state[ours][key], local.optimizer.state[theirs][key]
                torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_the_price_of_what_is_written_is_the_plans() -> None:
    made = _case("gpt2-lm", (2, 1, 0))
    plan = made.plan
    for config in (ipu_config_of_plan(plan), ipu_config_of_plan(plan, made.config)):
        assert config.serialized_embedding_splits_per_ipu == (2, 1, 0)
        assert predict(plan.graph, config, plan.machine).time.total_s == plan.objective_s
    assert [(a.module, a.ipu, a.rows) for a in annotate(plan) if a.rows] == [
        ("transformer.wte", 0, (0, 68)), ("transformer.wte", 1, (68, 102)),
        ("lm_head", 0, (0, 68)), ("lm_head", 1, (68, 102)),
    ]  # fmt: skip
    with pytest.raises(LoweringError, match="rows of one table are on several IPUs"):
        ipp.compile(made.model, plan, optimizer=sgd(made.model))
