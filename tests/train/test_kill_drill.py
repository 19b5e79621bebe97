"""Kill -9 at any moment of a local training changes nothing; a drill without kills is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends.cluster.drill import Outcome, problems
from tests.backends.cluster.drill_worker import Kill
from tests.train import kill_drill
from tests.train.kill_drill import DrillError, drill


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("points", "async_save"), [(100, False), (25, True)])
def test_a_killed_training_ends_as_if_nothing_had_happened(
    tmp_path: Path, points: int, *, async_save: bool
) -> None:
    assert drill(points, 1, tmp_path, async_save=async_save) == 0


def test_a_kill_that_does_not_happen_is_an_error_of_the_drill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def training(output: Path, *_: object, **__: object) -> dict[str, object]:
        (output / "checkpoint-9").mkdir(parents=True)
        return {"events": ["a step"], "loss": 0.0}

    monkeypatch.setattr(kill_drill, "training", training)
    monkeypatch.setattr(kill_drill, "latest_checkpoint", lambda folder: folder / "checkpoint-9")
    with pytest.raises(DrillError, match="the kill at moment 0 did not happen: a step"):
        drill(1, 0, tmp_path)
    outcome = Outcome({"attempt": 0}, [], 0.0)
    kill = Kill("forward", 1, 3, 2, "transformer.h.2")
    with pytest.raises(DrillError, match="did not happen: rank 1 in step 3, forward of transf"):
        problems(outcome, outcome, kill)
