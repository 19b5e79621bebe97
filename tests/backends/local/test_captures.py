"""A bounded number of shapes is remembered; a forgotten program is captured again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from unittest import mock

import pytest

from ipu_pipeline.capture.captured import CapturedModel
from ipu_pipeline.capture.replay import Differs
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.captures import MAX_SHAPES, StageCache
from ipu_pipeline.stages.stage import Stage
from tests.backends.local.helpers import compiled
from tests.tiny_models import TINY


@pytest.fixture
def sizes_are_programs() -> Iterator[None]:
    """Every shape is a program of its own, as where shapes depend on values."""
    with mock.patch.object(CapturedModel, "sized", side_effect=Differs("")):
        yield


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.endswith("captures")]


@pytest.mark.usefixtures("sizes_are_programs")
def test_the_oldest_shapes_are_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    executable, _ = compiled()
    dropped: list[tuple[Stage, ...]] = []
    cache = StageCache(
        executable.model,
        executable.plan,
        "float32",
        recompute=frozenset(),
        self_check=False,
        max_shapes=2,
        on_drop=dropped.append,
    )
    batches = [TINY["bert-qa"].batch(seq_length=length) for length in (8, 12, 16)]
    parts = [Microbatch(0, batch, 2, 1.0) for batch in batches]
    short, middle, long = (cache.prepare([part])[0][0] for part in parts)
    assert dropped == [short]
    assert cache.prepare(parts[1:2])[0] == [middle]
    assert cache.prepare(parts[:1])[0] != [short]
    assert dropped == [short, long]
    assert len(said(caplog)) == 1


def test_a_program_lives_as_long_as_one_of_its_sizes(caplog: pytest.LogCaptureFixture) -> None:
    executable, _ = compiled()
    with executable, caplog.at_level(logging.WARNING, logger="ipu_pipeline"):
        cache = executable._cache
        cache._shapes.limit = 2
        for length in (8, 12, 16, 8):
            executable.train_step(TINY["bert-qa"].batch(batch_size=8, seq_length=length))
        assert (len(cache._shapes), len(cache._programs()), cache.captures) == (2, 1, 1)
        for length in (8, 12):
            executable.eval_step(TINY["bert-qa"].batch(batch_size=8, seq_length=length))
        executable.train_step(TINY["bert-qa"].batch(batch_size=8, seq_length=20))
        assert (len(cache._shapes), len(cache._programs()), cache.captures) == (2, 2, 2)
    assert not said(caplog)


@pytest.mark.usefixtures("sizes_are_programs")
def test_an_executable_keeps_so_many_shapes_and_says_when_it_forgets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    executable, _ = compiled()
    with executable, caplog.at_level(logging.WARNING, logger="ipu_pipeline"):
        executable._cache._shapes.limit = 2
        for length in (8, 12, 16, 8):
            batch = TINY["bert-qa"].batch(batch_size=8, seq_length=length)
            executable.train_step(batch)
        assert len(executable._cache._shapes) == 2
    assert MAX_SHAPES == 16
    (message,) = said(caplog)
    assert "in more than 2 shapes" in message
    assert "pad to fewer lengths (pad_to_multiple_of)" in message
