"""One rank of a large job, played in this process: what it holds, and what it sends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig
from typer.testing import CliRunner

from ipu_pipeline.backends.cluster.dryrun.memory_tally import (
    ACTIVATIONS,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
)
from ipu_pipeline.backends.cluster.dryrun.report import DryRun, dry_run, model_of
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.cli import app
from ipu_pipeline.compiler import plan
from ipu_pipeline.errors import LoweringError, PlanError
from ipu_pipeline.ir.plan import Plan, VocabularyRows

SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_hidden_layers": 8, "vocab_size": 4000,
    "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
LENGTH = 512


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(**SIZES).save_pretrained(folder)
    return str(folder)


def planned(config: str, schedule: str = "1f1b", stages: int = 4, **settings: Any) -> Plan:
    return plan(
        *from_config(config, batch_size=2, seq_length=LENGTH),
        machine="h100-x64", schedule=schedule, num_stages=stages, replicas=2, microbatches=8,
        settings={"precision": "bfloat16", **settings},
    )  # fmt: skip


def played(made: Plan, config: str, rank: int) -> DryRun:
    return dry_run(made, rank, *model_of(made, config))


@pytest.mark.parametrize(
    ("schedule", "stages", "settings"),
    [
        ("1f1b", 4, {}),
        ("1f1b", 2, {"optimizer": "momentum"}),
        ("gpipe", 2, {"zero_stage": 1}),
    ],
)
def test_a_rank_holds_what_the_plan_says(
    config: str, schedule: str, stages: int, settings: dict[str, Any]
) -> None:
    made = planned(config, schedule, stages, **settings)
    found = played(made, config, 1)
    assert abs(found.difference) < 0.05, found.text()
    for kind in (WEIGHTS, GRADIENTS) if settings.get("zero_stage") else (WEIGHTS, OPTIMIZER):
        on_meta, by_plan = found.rows[kind]
        assert on_meta == pytest.approx(by_plan, rel=1e-3)


def test_masks_of_dropout_are_not_kept(tmp_path: Path) -> None:
    GPT2Config(
        n_embd=256, n_layer=8, n_head=8, n_positions=LENGTH, vocab_size=4000,
        architectures=["GPT2LMHeadModel"],
    ).save_pretrained(tmp_path)  # fmt: skip
    found = played(planned(str(tmp_path), stages=2), str(tmp_path), 0)
    on_meta, by_plan = found.rows[ACTIVATIONS]
    assert by_plan == pytest.approx(on_meta, rel=0.03)


def test_gradients_wait_for_those_of_weights(config: str) -> None:
    """The second rank of zero bubbles, whose stages are neither the first nor the last one."""
    found = played(planned(config, "zbv", 4), config, 1)
    assert abs(found.difference) < 0.05, found.text()


def test_the_play_sends_what_the_check_of_messages_has(config: str) -> None:
    made = planned(config)
    found = played(made, config, 5)  # the second rank of the second pipeline
    assert found.played is not None
    assert (found.played.replica, found.played.position, found.played.stages) == (1, 1, (1,))
    calls = found.played.collectives
    own = [p for p in made.graph.parameters if p.blocks[0] in made.stages[1].blocks]
    assert calls["allreduce", "replicas"][1] == pytest.approx(
        2 * sum(p.numel for p in own), rel=0.01
    )
    sent, received = (
        {
            f"rank {4 + peer}": sum(
                n for (_, sends, to), (n, _) in found.messages.of_rank.items()
                if sends is wanted and to == peer
            )
            for peer in (0, 2)
        }
        for wanted in (True, False)
    )  # fmt: skip
    assert {whom: n for (name, whom), (n, _) in calls.items() if name == "send"} == sent
    assert {whom: n for (name, whom), (n, _) in calls.items() if name == "recv"} == received


def test_the_command(config: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    planned(config).save(file)
    runner = CliRunner()
    found = runner.invoke(app, ["dryrun", str(file), "--model", config, "--rank", "3", "--json"])
    raw = json.loads(found.stdout)
    assert (raw["world_size"], raw["rank"]["stages"], raw["messages"]["problem"]) == (8, [3], "")
    assert abs(raw["rank"]["difference"]) < 0.05
    alone = runner.invoke(app, ["dryrun", str(file)])
    for text in ("messages of 4 ranks x 4 stages", "no rank waits for ever", "--model to play it"):
        assert text in alone.output


def test_a_plan_for_another_engine_is_priced_beside_it(config: str) -> None:
    found = played(planned(config, engine="megatron"), config, 0)
    assert found.written.total != found.planned.total
    for text in ("the plan is for another engine", "rank 0 of 8", "optimizer state", "allreduce"):
        assert text in found.text()


def test_what_cannot_be_played_is_refused(config: str, tmp_path: Path) -> None:
    made = planned(config)
    with pytest.raises(
        ValueError, match=r"8 ranks \(replicas 2 x pipeline 4 x tp 1\), from 0 to 7"
    ):
        dry_run(made, 8)
    few = replace(made, num_microbatches=3)
    with pytest.raises(LoweringError, match="schedule 1f1b needs at least as many microbatches"):
        played(few, config, 0)
    for settings, named in (
        ({"zero_stage": 3}, "zero_stage 3"),
        ({"recompute": ["mlp"]}, "recompute mlp"),
        ({"gradient_bytes": 4}, "gradient_bytes 4"),
    ):
        with pytest.raises(LoweringError, match=f"the plan has {named}, which a dry run"):
            dry_run(replace(made, settings={**made.settings, **settings}), 0)
    away = replace(made.stages[0], offload=made.stages[0].blocks[:1])
    spread = replace(made, vocabulary=VocabularyRows(((0, 0, 9),)))
    for wrong, named in (
        (replace(made, stages=(away, *made.stages[1:])), "offload of "),
        (spread, "a vocabulary spread over stages"),
    ):
        with pytest.raises(LoweringError, match=f"the plan has {named}"):
            dry_run(wrong, 0)
    with pytest.raises(LoweringError, match="a dry run plays training on GPUs with known kernels"):
        dry_run(replace(made, graph=replace(made.graph, training=False)), 0)
    other = LlamaConfig(**{**SIZES, "num_hidden_layers": 4})
    other.save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="is not the one that was planned"):
        model_of(made, str(tmp_path))
