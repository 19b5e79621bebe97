"""TRL's trainers over a pipeline: ``class X(PipelineMixin, SFTTrainer)``, equal to TRL's own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.backends.cluster.processes import Processes
from tests.later import one_in
from tests.train.test_process_steps import assert_equal
from tests.train.trl_programs import FORMS, trained

pytest.importorskip("trl", reason="TRL is not installed: pip install 'ipu-pipeline[dev]'")
pytestmark = pytest.mark.filterwarnings("ignore")


def losses_of(run: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in run["history"] if "loss" in entry]


@pytest.mark.parametrize("name", one_in(12, FORMS))
def test_losses_metrics_and_weights_are_those_of_trl(tmp_path, name) -> None:
    theirs = trained(name, str(tmp_path / "theirs"), pipeline=False)
    ours = trained(name, str(tmp_path / "ours"))
    assert_equal(ours, theirs, 1e-5)
    assert losses_of(ours) == pytest.approx(losses_of(theirs), rel=1e-6)


@pytest.mark.acceptance
@pytest.mark.parametrize("names", [[*FORMS][n::4] for n in range(4)])
def test_in_two_processes(tmp_path, names) -> None:
    processes = Processes(2)
    try:
        for name in names:
            theirs = trained(name, str(tmp_path / f"{name}-theirs"), pipeline=False)
            found = processes.run("trainer_jobs.by_trl", name=name, folder=str(tmp_path / name))
            for ours in found:
                assert_equal(ours, theirs, 1e-5)
                assert losses_of(ours) == pytest.approx(losses_of(theirs), rel=1e-6)
    finally:
        processes.close()
