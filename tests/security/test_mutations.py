"""Files with one thing wrong: the same result, or one error of ours that names the file.

``make test`` tries 2,000 of them, ``make test-acceptance`` 50,000 (``IPU_PIPELINE_MUTATIONS``).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from math import isfinite
from pathlib import Path

import pytest

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.schedules.simulate import simulate
from tests.ir.plan_example import example_plan
from tests.security.mutations import mutated

NUMBER = int(os.environ.get("IPU_PIPELINE_MUTATIONS", "2000"))
LONGEST = 1500


def use_plan(path: Path) -> None:
    """Read a plan and do what commands do with it."""
    plan = Plan.load(path)
    plan.explain()
    simulate(plan)
    for stage in plan.stages:
        numbers = (stage.forward_s, stage.backward_s, stage.transfer_s, stage.memory_bytes)
        assert all(isfinite(number) and number >= 0 for number in numbers), numbers


def use_machine(path: Path) -> None:
    """Read a machine and do what the planner does with it."""
    machine = Machine.load(path)
    machine.fingerprint()
    assert machine.link_between(0, len(machine.devices) - 1).transfer_s(8) >= 0
    assert all(device.peak_flops_per_s("float32") > 0 for device in machine.devices)


def use_ipu_config(path: Path) -> None:
    """Read an IPU configuration."""
    IPUConfig.load(path)


def write_ipu_config(path: Path) -> None:
    IPUConfig(layers_per_ipu=(1, 2, 3), gradient_accumulation_steps=16).save(path)


def write_machine(path: Path) -> None:
    path.write_text(json.dumps(machine_by_name("a100-80g-x4").to_json()), encoding="utf-8")


KINDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], None]]] = {
    "plan.json": (lambda path: example_plan().save(path), use_plan),
    "machine.json": (write_machine, use_machine),
    "ipu_config.json": (write_ipu_config, use_ipu_config),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_file_is_used_or_refused_by_name(tmp_path: Path, name: str) -> None:
    write, use = KINDS[name]
    path = tmp_path / name
    write(path)
    text = path.read_text(encoding="utf-8")
    use(path)
    for number in range(NUMBER // len(KINDS)):
        path.write_text(mutated(text, random.Random(number)), "utf-8", errors="surrogatepass")
        wrong = problem(use, path)
        assert not wrong, f"mutation {number}: {wrong}"


def problem(use: Callable[[Path], None], path: Path) -> str:
    """Return what is wrong with how a file is used or refused; nothing where that is right."""
    try:
        use(path)
    except PipelineError as error:
        if len(str(error)) > LONGEST:
            return f"a message of {len(str(error))} characters: {str(error)[:200]}"
        return "" if path.name in str(error) else f"the file is not named: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
