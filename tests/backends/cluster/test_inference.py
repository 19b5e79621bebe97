"""Generation in processes: tokens of the model alone, each rank with its own stages' weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.backends.cluster.inference_jobs import LENGTHS, inputs_of
from tests.backends.cluster.processes import Processes
from tests.test_task_pipeline import assert_same
from tests.tiny_models import TINY


@pytest.mark.parametrize(
    ("name", "planned"),
    [
        ("gpt2-lm", {"num_stages": 2, "dropout": True}),
        pytest.param("whisper", {"num_stages": 2}, marks=pytest.mark.acceptance),
    ],
)
def test_a_trained_model_generates_what_it_generates_alone(
    two: Processes, name: str, planned: dict[str, int]
) -> None:
    """Beams, sampling by the first rank's seed, several batches in flight, a forward pass."""
    for found in two.run("inference_jobs.generated", name=name, planned=planned):
        assert all(found), found


def test_weights_that_a_rank_does_not_have_are_not_used(two: Processes, tmp_path: Path) -> None:
    model, _ = TINY["gpt2-lm"].build()
    model.save_pretrained(tmp_path)
    _, batch = TINY["gpt2-lm"].build(batch_size=8, seed=3)
    with torch.no_grad():
        expected = model.eval().generate(**inputs_of(batch), **LENGTHS).tolist()
    for tokens, refused in two.run("inference_jobs.from_meta", weights=str(tmp_path)):
        assert tokens == expected
        assert "every stage keeps the cache of its own layers during one call only" in refused[0]
        assert "`model_kwargs` are not used by the model: ['nothing']" in refused[1]


def test_pipelines_over_ranks_give_what_the_model_gives(two: Processes) -> None:
    cases = ["zero-shot-classification", "automatic-speech-recognition of a seq2seq model"]
    for found in two.run("inference_jobs.served", cases=cases):
        for ours, alone in found:
            assert_same(ours, alone)


def test_ranks_decide_alike(two: Processes) -> None:
    """Clocks count on the first rank only, streamers hear batch after batch, chance is refused."""
    for found in two.run("inference_jobs.decided_otherwise"):
        assert found["stopped"] == 10
        assert found["in_turn"]
        assert "the ranks have drawn different tokens, so that none" in found["refused"]
        assert found["again"]
        assert found["left"] == []


@pytest.mark.acceptance
def test_four_stages_and_two_replicas(four: Processes) -> None:
    for name in ("gpt2-lm", "t5", "bart", "llama", "mixtral", "whisper"):
        for planned in ({"num_stages": 4}, {"num_stages": 2, "replicas": 2}):
            for found in four.run("inference_jobs.generated", name=name, planned=planned):
                assert all(found), (name, planned, found)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"planned": {"num_stages": 2}, "precision": "bf16"}, "is autocast, which does not know"),
        (
            {"planned": {"num_stages": 2, "vocabulary": "even"}},
            "spreads the vocabulary over stages, and generate and forward look up",
        ),
    ],
)
def test_what_ranks_cannot_do_together_is_refused(
    two: Processes, job: dict[str, object], message: str
) -> None:
    assert all(message in text for text in two.run("inference_jobs.refused", **job))
