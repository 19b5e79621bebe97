"""Training scripts composed of features give what transformers' ``Trainer`` gives."""

from __future__ import annotations

import pytest

from tests.programs.training_script import Script, difference, eager, observed, pipelined

SCRIPTS = (
    Script(weight="random", log="item", constant="teacher"),
    Script(weight="running mean", log="detach", constant="loss module", microbatches=3),
    Script(weight="callback", log="log", constant="array", inputs="mixed", stages=3),
    Script(log="branch", inputs="mask dropped", calls="outputs changed", evaluates=True),
    Script(weight="global step", calls="twice", constant="in a closure"),
)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_gives_what_plain_trainer_gives(script: Script) -> None:
    truth = observed(eager(script), script)
    found = observed(pipelined(script, num_stages=script.stages), script)
    assert not difference(truth, found)
