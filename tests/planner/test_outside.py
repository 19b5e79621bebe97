"""A machine, a pass and a backend are added from outside by one file each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ipu_pipeline as ipp
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.backend import backend_names, backend_of
from ipu_pipeline.planner.passes.manager import available_passes
from ipu_pipeline.planner.price import price
from ipu_pipeline.planner.schedules.simulate import simulate
from tests.ir.plan_example import example_machine
from tests.outside import installed
from tests.tiny_models import TINY


def described(name: str, **fields: object) -> str:
    return json.dumps({**example_machine().to_json(), "name": name, **fields})


def test_a_machine_is_one_json_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "by-variable.json").write_text(described("by-variable"))
    with pytest.raises(PlanError, match="machine 'by-variable' is neither known"):
        machine_by_name("by-variable")
    monkeypatch.setenv("IPU_PIPELINE_MACHINES", str(tmp_path))
    assert machine_by_name("by-variable").name == "by-variable"
    files = {"racks_of_mine/__init__.py": "", "racks_of_mine/rack.json": described("rack")}
    (tmp_path / "more").mkdir()
    with installed(tmp_path / "more", files, {"ipu_pipeline.machines": "mine = racks_of_mine"}):
        model, batch = TINY["bert-qa"].build(device="meta")
        plan = ipp.plan(model, batch, machine="rack", num_stages=2)
    assert (plan.machine.name, backend_of(plan.machine).name) == ("rack", "cluster")


PASS = """
from dataclasses import dataclass, replace
from typing import ClassVar

@dataclass(frozen=True)
class LastWhole:
    name: ClassVar[str] = "first_stage_recomputes"
    unused: int = 0

    def run(self, plan):
        first = replace(plan.stages[0], recompute=plan.stages[0].blocks)
        return replace(plan, stages=(first, *plan.stages[1:]))
"""


def test_a_pass_is_one_file(tmp_path: Path) -> None:
    points = {"ipu_pipeline.passes": "first_stage_recomputes = a_pass_of_mine:LastWhole"}
    model, batch = TINY["bert-qa"].build(device="meta")
    with installed(tmp_path, {"a_pass_of_mine.py": PASS}, points):
        assert "first_stage_recomputes" in available_passes()
        plan = ipp.plan(
            model, batch, machine="a100-80g-x8", num_stages=2, passes="first_stage_recomputes"
        )
    plain = ipp.plan(model, batch, machine="a100-80g-x8", num_stages=2)
    assert plan.stages[0].recompute
    assert plan.objective_s > plain.objective_s


BACKEND = """
from dataclasses import dataclass, replace

from ipu_pipeline.backends.cluster.backend import ClusterBackend
from ipu_pipeline.ir.codec import from_json
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.machine import Machine

@dataclass(frozen=True)
class Abacus(ClusterBackend):
    name: str = "abacus"
    target: str = "beads"

    def own_machine(self, num_devices):
        return from_json(Machine, DESCRIBED, "abacus", PlanError)

    def rules(self, graph, machine, limits):
        return replace(limits, max_stages=2)

    def step(self, plan):
        found = super().step(plan)
        return replace(found, step_s=found.step_s + 1.0, once_s={"moving beads": 1.0})

    def lower(self, model, plan, optimizer, options):
        return f"{plan.num_stages} rods"

BACKEND = Abacus()
"""


def test_a_backend_is_one_module(tmp_path: Path) -> None:
    machine = {**json.loads(described("abacus", backend="abacus"))}
    files = {"abacus_backend.py": f"DESCRIBED = {machine!r}\n{BACKEND}"}
    points = {"ipu_pipeline.backends": "abacus = abacus_backend:BACKEND"}
    model, batch = TINY["bert-qa"].build()
    with installed(tmp_path, files, points):
        assert "abacus" in backend_names()
        plan = ipp.plan(model, batch, machine="abacus")
        assert plan.objective_s == price(plan).step_s == simulate(plan).step_s > 1.0
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
        assert ipp.compile(model, plan, target="beads") == f"{plan.num_stages} rods"
        assert plan.num_stages <= 2
    with pytest.raises(PlanError, match="is for backend 'abacus', which is not installed; instal"):
        price(plan)
