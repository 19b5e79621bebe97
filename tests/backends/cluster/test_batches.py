"""Batches of any size and length compute what the local target computes with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ipu_pipeline.backends.cluster.layout import (
    Layout,
    position_of_stages,
    schedule_for,
    torch_schedule,
    torch_schedules,
)
from ipu_pipeline.backends.cluster.ranks.consistency import (
    NOTE_BYTES,
    _note,
    _text,
    refuse_sparse_gradients,
)
from ipu_pipeline.backends.cluster.shares import dealt
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.batch import batch_text
from ipu_pipeline.stages.loss_shares import Counted, MixedSamplesError, _agreed_rule
from tests.backends.cluster import batch_jobs, jobs
from tests.backends.cluster.processes import Processes
from tests.later import in_turn, now

TWO = {"num_stages": 2}
FOUR = {"num_stages": 4}
TWO_BY_TWO = {"num_stages": 2, "replicas": 2, "microbatches": 3}
FULL = 2 * jobs.MICROBATCHES
# Descending: a short microbatch is first met after full ones of the same step.
SEVERAL = [FULL, 7, 5, 2, 1]
SOME = [7, 6, 3, 1]  # 4, 3, 2 and 1 microbatches
OPTIONS = {"max_grad_norm": 0.5, "loss_scaling": 8.0}


@pytest.mark.parametrize(
    ("name", "schedule", "planned", "sizes", "fallback"),
    [
        ("bert-qa", "1f1b", TWO, SEVERAL, "gpipe"),
        pytest.param("gpt2-lm", "gpipe", TWO, SOME, "", marks=pytest.mark.acceptance),
        pytest.param("bert-qa", "interleaved", FOUR, SOME, "", marks=pytest.mark.acceptance),
        ("bert-qa", "interleaved", {**FOUR, "microbatches": 6}, [11], "looped_bfs"),
        pytest.param("gpt2-lm", "zbv", FOUR, SOME, "", marks=pytest.mark.acceptance),
        pytest.param("t5", "1f1b", TWO, [FULL, 5, 1], "gpipe", marks=pytest.mark.acceptance),
        pytest.param(
            "gpt2-lm", "interleaved_zero_bubble", FOUR, [7, 4, 1], "", marks=pytest.mark.acceptance
        ),
        pytest.param("bert-qa", "dualpipev", FOUR, [7, 3], "zbv", marks=pytest.mark.acceptance),
    ],
)
def test_short_batches_equal_the_local_targets(
    two: Processes,
    name: str,
    schedule: str,
    planned: dict[str, Any],
    sizes: list[int],
    fallback: str,
) -> None:
    planned = {**planned, "dropout": True}
    found = two.run(
        "batch_jobs.trained", name=name, sizes=sizes, planned=planned, schedule=schedule, **OPTIONS
    )
    assert_equal(found, name, sizes, planned)
    said = [text for rank in found for text in rank["messages"] if "that a short batch has" in text]
    assert len(said) == bool(fallback)  # once, by one rank
    assert all(f"schedule {schedule} cannot run a number" in text for text in said)
    assert all(f"runs with {fallback} then" in text for text in said)


@pytest.mark.parametrize(
    ("name", "schedule", "planned", "sizes"),
    [
        ("bert-qa", "1f1b", FOUR, [1, 3, 7, FULL]),
        ("gpt2-lm", "gpipe", FOUR, [2, 5]),
        ("lxmert-qa", "interleaved", {"num_stages": 8, "microbatches": 8}, [13]),
        ("lxmert-qa", "zbv", {"num_stages": 8, "microbatches": 8}, [15, 1]),
        ("bert-qa", "1f1b", TWO_BY_TWO, [12, 11, 9, 5, 3, 1]),
        ("gpt2-lm", "1f1b", TWO_BY_TWO, [1, 7]),
        ("gpt2-lm", "zbv", {**TWO_BY_TWO, "num_stages": 4}, [7, 1]),
    ],
)
@pytest.mark.acceptance
def test_on_four_processes(
    four: Processes, name: str, schedule: str, planned: dict[str, Any], sizes: list[int]
) -> None:
    planned = {**planned, "dropout": True}
    found = four.run(
        "batch_jobs.trained", name=name, sizes=sizes, planned=planned, schedule=schedule, **OPTIONS
    )
    assert_equal(found, name, sizes, planned)


@pytest.mark.parametrize(
    ("name", "planned", "sizes"),
    [
        ("gpt2-lm", {"num_stages": 1, "replicas": 2, "microbatches": 2}, [8, 7, 5, 1]),
        pytest.param("bert-qa", TWO_BY_TWO, [12, 11, 9, 5, 3, 1], marks=pytest.mark.acceptance),
        pytest.param(
            "mixtral",
            {"num_stages": 1, "replicas": 4, "microbatches": 1},
            [8, 5, 2],
            marks=pytest.mark.acceptance,
        ),
    ],
)
def test_shares_of_replicas_equal_the_local_target(
    request: pytest.FixtureRequest, name: str, planned: dict[str, Any], sizes: list[int]
) -> None:
    """With dropout, labels that are uneven, and short batches of which a replica has nothing."""
    processes = request.getfixturevalue("two" if name == "gpt2-lm" else "four")
    planned = {**planned, "dropout": True}
    found = processes.run(
        "batch_jobs.trained", name=name, sizes=sizes, planned=planned, batches="share", **OPTIONS
    )
    assert_equal(found, name, sizes, planned)


@pytest.mark.acceptance
@pytest.mark.parametrize("microbatches", [1, 2])
def test_every_loss_of_shares_is_that_of_the_whole_batch(two: Processes, microbatches: int) -> None:
    for found in two.run("batch_jobs.each_loss_in_shares", microbatches=microbatches):
        refused = {name for name, one in found.items() if "refused" in one}
        assert refused <= {"counted_in_python", "divided_by_a_number_read_in_python"}
        for name, one in found.items():
            if name not in refused:
                assert one["loss"] == pytest.approx(one["expected"], rel=1e-5), name
                assert one["close"], name


def test_what_shares_do_not_give_is_refused_by_all(two: Processes) -> None:
    """Of batches that are cut here or by the caller; the first ones have no labels in a share."""
    messages = [
        "is not that of its microbatches: of 4 samples at once",
        "draws from generators of Python or numpy, or keeps or reads values in Python whenever",
        "draws from generators of Python or numpy, or keeps or reads values in Python whenever",
        "draws from generators of Python or numpy, or keeps or reads values in Python whenever",
        "draws from generators of Python or numpy, or keeps or reads values in Python whenever",
        "the share of the first batch has fewer than two samples, on which could be seen how",
        "the share of every replica is empty; pass at least one sample of the batch to one of",
    ]
    for found in two.run("batch_jobs.refused_in_shares"):
        for one, message in zip(found[: len(messages)], messages, strict=True):
            assert message in one["refused"]
        for one in found[len(messages) :]:
            assert one["loss"] == pytest.approx(one["expected"], rel=1e-5)
            assert one["close"]


def test_replicas_that_measure_differently_are_refused() -> None:
    assert _agreed_rule([Counted(1, rules=("",)), Counted(1, rules=("sum",))]) == "sum"
    with pytest.raises(
        LoweringError, match=r"measured as \[\('mean',\), \('sum',\)\] on the shares of the re"
    ):
        _agreed_rule([Counted(1, rules=("mean",)), Counted(1, rules=("sum",))])
    with pytest.raises(MixedSamplesError, match="has 1 terms here and 2 there, as if it had one"):
        _agreed_rule([Counted(1, counts=(1.0,)), Counted(1, counts=(1.0, 2.0))])


def assert_equal(
    found: list[dict[str, Any]], name: str, sizes: list[int], planned: dict[str, Any]
) -> None:
    """Compare with the local target: one pipeline with all the replicas' microbatches."""
    replicas = planned.get("replicas", 1)
    microbatches = planned.get("microbatches", jobs.MICROBATCHES) * replicas
    alone = {**planned, "replicas": 1, "microbatches": microbatches}
    expected = batch_jobs.trained(name, sizes=sizes, planned=alone, target="local", **OPTIONS)
    for rank in found:
        assert rank["samples"] == [min(size, 2 * microbatches) for size in sizes]
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert_close(rank["state"], expected["state"])
        assert set(rank["state"]) == set(expected["state"])
    for index, whole in enumerate(expected["gradients"]):
        assert {n for rank in found for n in rank["gradients"][index]} == set(whole)
        for rank in found:
            assert_close(rank["gradients"][index], whole)


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    scale = max(np.abs(value).max() for value in expected.values())
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-6 * scale, err_msg=name)


@pytest.mark.parametrize(
    ("loss", "microbatches"),
    in_turn(["shifted", "own_mask", "summed", "with_positions"], [8, 2]),
)
def test_uneven_labels_give_the_loss_of_the_whole_batch(
    two: Processes, loss: str, microbatches: int
) -> None:
    expected = batch_jobs.uneven(loss, 1, target="local")
    assert expected[0] == pytest.approx(expected[1], rel=1e-5)
    if loss == "with_positions":  # no mean: it depends on the size of the microbatches
        expected = batch_jobs.uneven(loss, microbatches, target="local")
    for found in two.run("batch_jobs.uneven", loss=loss, microbatches=microbatches):
        assert found == pytest.approx(expected, rel=1e-5)


def test_embeddings_with_sparse_gradients_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(3, 2, sparse=True))
    with pytest.raises(
        LoweringError, match=r"the gradient of .0. is sparse .*set its sparse to Fa"
    ):
        refuse_sparse_gradients(model)


@pytest.mark.parametrize(("limit", "number"), now([(3, 4)], [(None, 4), (3, 4), (None, 7)]))
def test_other_lengths_are_one_program_and_the_oldest_shapes_are_forgotten(
    two: Processes, limit: int | None, number: int
) -> None:
    calls = [(8, 16), (7, 12), (8, 20), (8, 16), (5, 12), (8, 16), (7, 12)][:number]
    options = {"planned": {**TWO, "dropout": True}, "loss_weights": "samples"}
    found = two.run("batch_jobs.lengths", name="bert-qa", calls=calls, limit=limit, **options)
    expected = batch_jobs.lengths("bert-qa", calls=calls, target="local", **options)
    for rank in found:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert rank["sum"] == pytest.approx(expected["sum"], abs=1e-3)
        shapes, pipelines = rank["kept"][-1]
        assert not [text for text in rank["messages"] if "pad to fewer lengths" in text]
        if limit is None:
            # Lengths 16 and 20 in microbatches of 2, length 12 of 2 and 1: trained and evaluated.
            assert shapes == 2 * 2 + 2 * 2
            assert pipelines == 2 + 3 or number < 7  # the last ones have other microbatches
        else:
            assert all(kept[0] <= limit and kept[1] <= 3 for kept in rank["kept"])


@pytest.mark.parametrize(
    ("odd", "call", "size", "seq_length"),
    [
        pytest.param(0, "train_step", 8, 12, marks=pytest.mark.acceptance),
        (1, "train_step", 7, 16),
        pytest.param(0, "forward_backward", 8, 20, marks=pytest.mark.acceptance),
        pytest.param(1, "eval_step", 3, 8, marks=pytest.mark.acceptance),
    ],
)
def test_a_rank_with_another_batch_is_named(
    odd: int, call: str, size: int, seq_length: int
) -> None:
    processes = Processes(2, joined=False)
    arguments = {"odd": odd, "size": size, "seq_length": seq_length, "call": call}
    found = processes.run("batch_jobs.odd_batch", planned=TWO, **arguments)
    processes.close()
    kind = "evaluation" if call == "eval_step" else "training"
    step = 2 if call == "train_step" else 1
    texts = [f"{kind} in step {step} with input_ids 8x16 int64, "] * 2
    texts[odd] = f"{kind} in step {step} with input_ids {size}x{seq_length} int64, "
    for rank in found:
        assert f"ValueError: rank 1 was called for {texts[1]}" in rank
        assert f"but rank 0 for {texts[0]}" in rank
        assert "give every rank the same whole batch" in rank


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        pytest.param(
            "odd_batch",
            {"odd": 2, "size": 9, "seq_length": 16},
            "with input_ids 9x16 int64",
            marks=pytest.mark.acceptance,
        ),
        ("odd_call", {}, "rank 3 was called for evaluation in step 0"),
    ],
)
def test_a_replica_with_another_batch_or_call_is_named(
    job: str, arguments: dict[str, int], message: str
) -> None:
    processes = Processes(4, joined=False)
    found = processes.run(f"batch_jobs.{job}", planned=TWO_BY_TWO, **arguments)
    processes.close()
    assert all(message in rank for rank in found)


def test_what_cannot_be_captured_is_refused_by_all_and_changes_nothing(two: Processes) -> None:
    for rank in two.run("batch_jobs.uncapturable", planned=TWO):
        before, message, after = rank
        assert "returned no loss for the batch" in message
        assert after != before
        assert np.isfinite(after)


def test_parts_are_dealt_evenly_and_the_last_replica_has_the_last() -> None:
    for replicas in range(1, 5):
        layouts = [Layout(2 * replica, replicas, 2, 2, (0, 1)) for replica in range(replicas)]
        for count in range(1, 13):
            found = [dealt(range(count), layout) for layout in layouts]
            assert [part for parts in found for part in parts] == list(range(count))
            sizes = [len(parts) for parts in found]
            assert max(sizes) - min(sizes) <= 1
            assert sizes[-1] == min(sizes)


def test_a_schedule_that_cannot_run_so_few_is_replaced_in_its_placement() -> None:
    assert schedule_for("1f1b", 4, 4, 4) == "1f1b"
    assert schedule_for("1f1b", 4, 4, 3) == "gpipe"
    assert schedule_for("Schedule1F1B", 4, 4, 1) == "gpipe"
    assert schedule_for("interleaved", 4, 2, 3) == "interleaved"
    assert schedule_for("interleaved", 4, 2, 5) == "looped_bfs"
    assert schedule_for("dualpipev", 4, 2, 3) == "zbv"
    for kind in torch_schedules():
        num_stages = 2 * kind.stages_per_device[0]
        for count in range(1, 9):
            found = schedule_for(kind.name, num_stages, 2, count)
            position_of_stages(found, num_stages, 2, count)
            assert torch_schedule(found).place == kind.place


def test_a_batch_is_described_whatever_it_holds() -> None:
    batch = {"x": np.zeros(2), "flag": True, "none": None, "name": "a"}
    assert batch_text(batch) == "x ndarray, flag True, none None, name 'a'"
    long = "input_ids 8x16 int64, " * 40
    note = _note(long)
    assert note.shape == (NOTE_BYTES,)
    assert long.startswith(_text(note))
    assert not np.array_equal(note, _note(long + "x"))
