"""Contestants train the same model, in worker processes that say what went wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.suite import contestants
from benchmarks.suite.contest import ContestError, Team, check_losses, contest, memory
from benchmarks.suite.contestants import UnavailableError, even_split, make
from benchmarks.suite.material import make_batch, make_material
from benchmarks.suite.workloads import Contestant, Suite, Workload, load
from tests.later import every_second

TINY = Workload(
    model="bert",
    task="question-answering",
    config={
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    sequence=16,
    micro_batch=2,
    microbatches=4,
    check_microbatches=4,
    precisions=["float32"],
    rounds=2,
    limit_s=60,
    contestants=["eager", "local, 2 stages 1f1b"],
)  # fmt: skip
GPT2 = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 99}


@pytest.fixture
def suite() -> Suite:
    return load()


def test_an_even_split() -> None:
    assert even_split("abcdef", 2) == [list("abc"), list("def")]
    assert [len(part) for part in even_split("abcdefg", 4)] == [2, 2, 1, 2]


@pytest.mark.parametrize("precision", every_second(["float32", "bf16"]))
def test_eager_and_ours_compute_the_same_and_learn(precision) -> None:
    material = make_material(TINY, precision)
    batch = make_batch(TINY, 4)
    eager, ours = (
        make(Contestant(kind, stages), TINY, precision, material)
        for kind, stages in (("eager", 1), ("local", 2))
    )
    before = eager.loss(batch)
    assert ours.loss(batch) == pytest.approx(before, rel=2e-2 if precision == "bf16" else 1e-5)
    for _ in range(10):
        eager.step(batch)
        ours.step(batch)
    assert eager.loss(batch) < before
    assert ours.loss(batch) == pytest.approx(eager.loss(batch), rel=2e-2)


def test_what_cannot_run_here_says_why(monkeypatch) -> None:
    material = make_material(TINY, "float32")
    monkeypatch.setattr(contestants.shutil, "which", lambda name: None)
    with pytest.raises(UnavailableError, match=r"torch.compile needs a C\+\+ compiler: c\+\+, g"):
        make(Contestant("compiled"), TINY, "float32", material)
    other = replace(TINY, model="gpt2", task="causal-lm", config=GPT2)
    with pytest.raises(
        UnavailableError, match="stages by hand are written for BERT, not GPT2LMHead"
    ):
        make(Contestant("raw", 2, "1f1b"), other, "float32", material)


def test_other_losses_are_refused() -> None:
    check_losses({"eager": 2.0, "ours": 2.0001}, 1e-4)
    with pytest.raises(ContestError, match=r"ours computed another loss than eager: .*Nothing was"):
        check_losses({"eager": 2.0, "ours": 2.01, "DDP": 2.0}, 1e-4)
    with pytest.raises(ContestError, match="DDP computed another loss"):
        check_losses({"eager": 2.0, "DDP": float("nan")}, 1e-4)


@pytest.mark.acceptance
def test_a_worker_that_fails_says_what_it_said() -> None:
    with (
        Team(TINY, "float32", processes=1, threads=1) as team,
        pytest.raises(ContestError, match=r"(?s)nobody failed in 'step'; .*KeyError: 'nobody'"),
    ):
        team.ask("step", "nobody")


@pytest.mark.acceptance
def test_a_contest_and_its_memory(suite) -> None:
    found = contest(suite, TINY, "float32", rounds=2)
    assert [len(seconds) for seconds in found.seconds.values()] == [2, 2]
    assert list(found.losses) == TINY.contestants
    assert found.unavailable == {}
    used = memory(suite, TINY, "float32", "eager", microbatches=2, steps=1)
    assert not isinstance(used, str)
    assert len(used["seconds"]) == len(used["bytes"]) == 1
    assert used["bytes"][0] > 50e6


@pytest.mark.acceptance
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_contest_over_processes(suite, precision) -> None:
    names = [name for name, each in suite.contestants.items() if each.kind != "compiled"]
    wanted = [*names[:1], *names[2:]]
    found = contest(suite, replace(TINY, contestants=wanted), precision, rounds=1)
    assert list(found.seconds) == wanted
    assert all(len(seconds) == 1 for seconds in found.seconds.values())
