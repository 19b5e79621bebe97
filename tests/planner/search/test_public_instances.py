"""Known optima of the public files, read in place; skipped where they are absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.solver_instances import main, read_instance, solve_instance

INSTANCES = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "instances"
pytestmark = pytest.mark.skipif(
    not INSTANCES.is_dir(), reason=f"the public instances are not at {INSTANCES}"
)
MAX_LOAD = {
    "bert24_inference": 17.78990625,
    "bert24_training": 41.7458125,
    "resnet50_inference": 33.774666015625,
    "op_bert_l-3_inference": 27.9185676799125,
    "gnmt_inference": 32.910658203125,
}
ROOMS_GIB = (4, 8, 12, 16, 24)
MEMORY_TABLE = {
    2: (None, None, None, 0.63173775, 0.525824),
    4: (None, None, 0.32501775, 0.29522075, 0.29522075),
    6: (None, 0.22977825, 0.210264, 0.1986315, 0.1986315),
    8: (None, 0.16585575, 0.16585575, 0.16451575, 0.16451575),
    12: (0.13198925, 0.12142325, 0.12109225, 0.11080125, 0.10083925),
    16: (0.11067325, 0.10042725, 0.10042725, 0.10042725, 0.10041325),
}


@pytest.mark.parametrize(("name", "optimum"), MAX_LOAD.items())
def test_max_load_optimum(name, optimum):
    search = solve_instance(read_instance(INSTANCES / f"{name}.json"))
    assert search.objective == pytest.approx(optimum, rel=1e-9)
    assert search.lower_bound == search.objective


@pytest.mark.parametrize("name", ["gnmt_inference", "resnet50_inference", "bert24_inference"])
def test_training_form_is_solved_exactly(name):
    instance = read_instance(INSTANCES / f"{name}.json", training=True)
    search = solve_instance(instance)
    alone = read_instance(INSTANCES / f"{name}.json")
    assert search.lower_bound == search.objective > 2 * solve_instance(alone).objective
    assert sum(instance.problem.held) == 2 * sum(alone.problem.held)


@pytest.mark.parametrize("devices", MEMORY_TABLE)
def test_memory_table(devices):
    for room, optimum in zip(ROOMS_GIB, MEMORY_TABLE[devices], strict=True):
        search = solve_instance(read_instance(INSTANCES / "piper_bert32.json", devices, room))
        if optimum is None:
            assert not search.pipelines
        else:
            assert search.objective == pytest.approx(optimum, rel=1e-9)
            assert search.lower_bound == search.objective


def test_command_line_prints_one_json_object_a_file(capsys):
    files = [str(INSTANCES / f"{name}.json") for name in ("bert24_inference", "resnet50_inference")]
    assert main([*files, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(line) for line in lines] == [
        {"file", "objective", "lower_bound", "gap", "seconds"}
    ] * 2
    assert [line["gap"] for line in lines] == [0.0, 0.0]


def test_command_line_says_infeasible(capsys):
    arguments = [str(INSTANCES / "piper_bert32.json"), "--devices", "2", "--memory-gib", "4"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objective"] is None
    assert main(arguments) == 0
    assert "infeasible" in capsys.readouterr().out
