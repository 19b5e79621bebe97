"""How many processes a plan gets, what they are told, and what is refused before a start."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ipu_pipeline.backends.cluster.launch import spec as launch
from ipu_pipeline.backends.cluster.launch.spec import (
    LaunchSpec,
    check_program,
    choose_nodes,
    choose_processes,
    crowding,
    make_spec,
    usable_cores,
)
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.machines import machine_by_name

PLAN = Path("/plans/plan.json")


def spec(**changes) -> LaunchSpec:
    given = {"plan_path": PLAN, "program": ("/a.py",), "num_processes": 4, "described": "4"}
    return LaunchSpec(**(given | changes))


@pytest.mark.parametrize(
    ("schedule", "stages", "replicas", "room", "expected"),
    [
        ("gpipe", 3, 1, 1, 3),
        ("1f1b", 4, 2, 1, 8),
        ("zbv", 4, 2, 1, 4),
        ("dualpipev", 2, 1, 9, 1),
        ("interleaved", 8, 1, 2, 2),
        ("interleaved", 8, 1, 7, 4),
        ("interleaved", 8, 1, 99, 4),
        ("looped_bfs", 8, 2, 4, 4),
        ("looped_bfs", 3, 1, 3, 3),
        ("looped_bfs", 3, 1, 2, 1),
        ("looped_bfs", 4, 2, 1, 2),
    ],
)
def test_processes_of_a_schedule(
    make_plan, schedule: str, stages: int, replicas: int, room: int, expected: int
) -> None:
    plan = make_plan(stages, replicas, schedule)
    assert choose_processes(plan, schedule, room) == expected
    make_spec(plan, PLAN, ("/a.py",), processes=expected)


def test_only_processes_that_the_schedule_can_run_are_chosen(make_plan) -> None:
    plan = make_plan(8, schedule="interleaved", microbatches=14)
    assert choose_processes(plan, "interleaved", 4) == 2  # 14 are no rounds of 4


@pytest.mark.parametrize(
    ("schedule", "processes", "message"),
    [
        ("popart", None, "has no schedule 'popart'"),
        ("1f1b", 4, "1f1b runs one stage per process: 6 stages do not fit 4 processes"),
        ("zbv", 6, "zbv runs exactly 2 stages per process, which they visit in a V: 6 stages do"),
        ("looped_bfs", 4, "6 stages do not fit 4 processes"),
        ("looped_bfs", 12, "12 processes are more than the plan's 6 stages x 1 replica"),
    ],
)
def test_processes_that_do_not_fit_are_refused(
    make_plan, schedule: str, processes: int | None, message: str
) -> None:
    request = dict(schedule=schedule, processes=processes)
    with pytest.raises(LoweringError, match=message):
        make_spec(make_plan(6), PLAN, ("/a.py",), **request, room=2)


def test_an_odd_number_of_stages_in_a_v_is_refused(make_plan) -> None:
    request = dict(schedule="zbv")
    with pytest.raises(
        LoweringError,
        match="zbv runs exactly 2 stages per process, which they visit in a V: 3 stages",
    ):
        make_spec(make_plan(3), PLAN, ("/a.py",), **request, room=2)


def test_what_is_described(make_plan) -> None:
    made = make_spec(make_plan(2, 2), PLAN, ("/a.py",), max_restarts=3, threads=2, room=9)
    assert made.described == "4 processes: 2 stages x 2 replicas, 1f1b"
    assert (made.num_processes, made.num_nodes, made.processes_per_node) == (4, 1, 4)
    assert (made.max_restarts, made.num_threads, made.schedule) == (3, 2, None)
    one = make_spec(make_plan(1), PLAN, ("/a.py",), room=1)
    assert one.described == "1 process: 1 stage x 1 replica, 1f1b"


def test_nodes_are_for_texts_only(make_plan) -> None:
    with pytest.raises(ValueError, match="on this machine only; for other machines add --print"):
        make_spec(make_plan(2), PLAN, ("/a.py",), nodes=2)


# ---------------------------------------------------------------- what the script is told


def test_settings() -> None:
    told = {"IPU_PIPELINE_PLAN": "/plans/plan.json", "IPU_PIPELINE_TARGET": "distributed"}
    assert spec().settings() == told
    assert spec(schedule="gpipe").settings() == {**told, "IPU_PIPELINE_SCHEDULE": "gpipe"}


def test_threads_are_shared_unless_the_user_says_otherwise() -> None:
    assert spec().threads({}, 8) == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    own = {"OMP_NUM_THREADS": "5"}
    assert spec().threads(own, 8) == {"OMP_NUM_THREADS": "5", "MKL_NUM_THREADS": "2"}
    assert set(spec(num_threads=3).threads(own, 8).values()) == {"3"}


# ---------------------------------------------------------------- the program


def test_a_script_is_made_absolute_and_a_module_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").touch()
    (tmp_path / "mine").mkdir()
    assert check_program(["a.py", "a.py", "-x"], tmp_path) == (str(tmp_path / "a.py"), "a.py", "-x")
    assert check_program(["-m", "mine.part", "-x"], tmp_path) == ("-m", "mine.part", "-x")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ([], "nothing to start: give a script, or -m and a module"),
        (["-m"], "nothing to start"),
        (["none.py"], "there is no script .*none.py; give launch's own options before --"),
        (["-m", "no_such.part"], "there is no module 'no_such', neither installed nor in"),
    ],
)
def test_what_cannot_be_started_is_refused(
    tmp_path: Path, program: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_program(program, tmp_path)


# ---------------------------------------------------------------- this machine


def test_processes_for_which_there_is_no_room_are_warned_of() -> None:
    assert crowding(4, num_cores=4, num_gpus=0) == ""
    assert crowding(4, num_cores=1, num_gpus=4) == ""
    assert "4 processes share 1 core, so they slow" in crowding(4, num_cores=1, num_gpus=0)
    assert "4 processes are more than the 2 GPUs" in crowding(4, num_cores=9, num_gpus=2)


@pytest.fixture
def cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four processors, two of which are threads of one core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(launch, "CPU_FOLDER", tmp_path)
    monkeypatch.setattr(launch, "QUOTA_FILE", tmp_path / "cpu.max")
    for processor, siblings in enumerate(("0,2", "1", "0,2", "3")):
        folder = tmp_path / f"cpu{processor}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    return tmp_path


def test_threads_of_one_core_count_once(cpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    assert usable_cores() == 1
    monkeypatch.setattr(launch, "CPU_FOLDER", cpus / "none")
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cores() == 5


@pytest.mark.parametrize(
    ("limit", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 3), ("?", 3)]
)
def test_a_containers_limit_counts(cpus: Path, limit: str, cores: int) -> None:
    (cpus / "cpu.max").write_text(f"{limit}\n")
    assert usable_cores() == cores


# ---------------------------------------------------------------- nodes


@pytest.mark.parametrize(
    ("processes", "nodes", "gpus", "machine", "expected"),
    [
        (8, None, None, None, (1, 0)),
        (8, 2, None, None, (2, 0)),
        (8, 4, 8, None, (4, 8)),
        (8, None, 4, None, (2, 4)),
        (12, None, 8, None, (2, 8)),
        (9, None, 4, None, (3, 4)),
        (13, None, None, "a100-80g-x16", (2, 8)),
        (16, None, None, "a100-80g-x16", (2, 8)),
        (4, None, None, "a100-80g-x4", (1, 8)),
        (8, None, 4, "a100-80g-x16", (2, 4)),
    ],
)
def test_nodes(processes, nodes, gpus, machine, expected) -> None:
    described = None if machine is None else machine_by_name(machine)
    assert choose_nodes(processes, nodes, gpus, described) == expected


@pytest.mark.parametrize(
    ("processes", "nodes", "gpus", "machine", "message"),
    [
        (2, 3, None, None, "2 processes leave some of 3 nodes without any; use at most 2 nodes"),
        (8, 2, 2, None, "8 processes on 2 nodes need 4 GPUs per node, and a node has 2"),
        (8, None, None, "pod16", "machine pod16 is for target poptorch, .* ipu-pipeline emit"),
        (16, None, None, "a100-80g-x8", "16 processes are more than the 8 devices of machine a100"),
    ],
)
def test_what_does_not_fit_the_nodes_is_refused(processes, nodes, gpus, machine, message) -> None:
    described = None if machine is None else machine_by_name(machine)
    with pytest.raises(LoweringError, match=message):
        choose_nodes(processes, nodes, gpus, described)


def test_a_plan_for_gpu_nodes_says_which(make_plan) -> None:
    plan = replace(make_plan(16, microbatches=16), machine=machine_by_name("a100-80g-x16"))
    path = Path("/plan.json")
    made = make_spec(plan, path, ("/a.py",), here=False)
    assert (made.num_nodes, made.gpus_per_node) == (2, 8)
    spec = make_spec(replace(plan, settings={"tp": 2}), path, ("/a.py",), nodes=4, here=False)
    assert (spec.num_processes, spec.described) == (
        32,
        "32 processes: 16 stages x 1 replica x tp 2, 1f1b",
    )
    made = make_spec(plan, path, ("/a.py",), here=False, nodes=4)
    assert (made.num_nodes, made.gpus_per_node) == (4, 0)
    made = make_spec(plan, path, ("/a.py",), room=1)
    assert (made.num_nodes, made.gpus_per_node) == (1, 0)
    request = dict(here=False, schedule="looped_bfs", nodes=2, gpus_per_node=2)
    assert make_spec(plan, path, ("/a.py",), **request).num_processes == 4
    request = dict(here=False, schedule="looped_bfs", nodes=2)
    assert make_spec(plan, path, ("/a.py",), **request).num_processes == 8
