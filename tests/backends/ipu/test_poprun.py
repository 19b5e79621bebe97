"""Several processes for one plan: what launch prints, and what a bundle does under poprun."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.bundle import emit
from ipu_pipeline.backends.ipu.check import check
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.poprun import make_poprun
from ipu_pipeline.backends.ipu.runtime.device import make_options, started_by_poprun
from ipu_pipeline.backends.ipu.settings import settings_for
from ipu_pipeline.cli import app
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from tests.tiny_models import TINY


@cache
def _plan(replicas: int = 4) -> Plan:
    model, batch = TINY["bert-qa"].build(device="meta")
    config = IPUConfig(
        layers_per_ipu=(2, 2), gradient_accumulation_steps=8, replication_factor=replicas
    )
    pod = "pod16" if replicas <= 8 else "pod64"
    return ipp.plan(model, batch, machine=pod, config=config, replicas=replicas)


def _launch(folder: Path, *options: str) -> Any:
    _plan().save(folder / "plan.json")
    asked = ("launch", str(folder / "plan.json"), *options, "--", "bundle/run.py", "--steps", "3")
    return CliRunner().invoke(app, asked)


def test_the_command_for_one_host_and_for_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = _launch(tmp_path, "--print")
    words = " ".join(result.stdout.replace("\\\n", "").split())
    assert words == (
        f"cd {tmp_path} poprun --num-instances=1 --num-replicas=4 --ipus-per-replica=2 python "
        f"{tmp_path}/bundle/run.py --steps 3"
    )
    result = _launch(tmp_path, "--print", "--nodes", "2", "--processes", "4")
    assert "HOSTS=...  # the names of 2 hosts" in result.stdout
    assert "--num-instances=4 \\\n  --num-replicas=4 \\\n  --ipus-per-replica=2" in result.stdout
    assert '--host="$HOSTS"' in result.stdout
    result = _launch(tmp_path, "--nodes", "2", "--slurm", "job.sh")
    assert "2 processes on 2 node(s)" in result.stdout
    text = (tmp_path / "job.sh").read_text()
    assert "#SBATCH --nodes=2" in text
    assert "scontrol show hostnames" in text
    subprocess.run(["bash", "-n", "job.sh"], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            (),
            "a plan for IPUs is started by poprun, which comes with Graphcore's SDK: give --print",
        ),
        (("--print", "--threads", "2"), "--threads is not for a plan for IPUs; --processes and"),
        (("--print", "--processes", "3"), "4 replicas do not divide evenly over 3 processes on 1"),
    ],
)
def test_what_launch_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "run.py").touch()
    result = _launch(tmp_path, *options)
    assert result.exit_code != 0
    assert message in " ".join(str(result.stderr or result.exception).split())


def test_processes_have_at_most_64_ipus(tmp_path: Path) -> None:
    large = replace(_plan(), replicas=64)
    assert make_poprun(large, ("run.py",)).instances == 2
    with pytest.raises(
        LoweringError, match="64 replicas of 2 IPUs in one process are more than 64"
    ):
        make_poprun(large, ("run.py",), instances=1)
    first, last = _plan().stages
    three = replace(large, stages=(first, replace(last, device=2)))
    with pytest.raises(LoweringError, match="a replica has 3 IPUs, poprun takes 1, 2, 4, 8"):
        make_poprun(three, ("run.py",))
    settings = settings_for(large)
    with pytest.raises(LoweringError, match="at most 64; lower the replicas, or emit a bundle and"):
        check(large, settings)
    emit(large, settings, tmp_path)  # for poprun
    wide = replace(large, stages=(first, replace(last, device=64)))
    with pytest.raises(LoweringError, match="a replica has 65 IPUs, at most 64 work together"):
        check(wide, settings, several_processes=True)


@pytest.fixture
def popdist(monkeypatch: pytest.MonkeyPatch, poptorch: Any) -> ModuleType:
    """Put a popdist there that says: the second of two instances, two of four replicas."""
    found, options = ModuleType("popdist"), ModuleType("popdist.poptorch")

    def make(ipus_per_replica: int) -> Any:
        made = poptorch.Options()
        made.replicationFactor(2)
        made.Distributed.configureProcessId(1, 2)
        made.useIpuId(ipus_per_replica)
        return made

    options.Options = make  # type: ignore[attr-defined]
    facts = {"getNumTotalReplicas": 4, "getNumLocalReplicas": 2, "getInstanceIndex": 1,
             "isPopdistEnvSet": True, "init": None}  # fmt: skip
    for name, value in facts.items():
        setattr(found, name, lambda value=value: value)
    found.__spec__ = ModuleSpec("popdist", None)
    found.poptorch = options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "popdist", found)
    monkeypatch.setitem(sys.modules, "popdist.poptorch", options)
    return found


def test_a_process_of_poprun_has_its_part_of_the_replicas(
    tmp_path: Path, popdist: Any, poptorch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(_plan(), seed=1)
    flat = settings.to_json()
    options = make_options(flat, poptorch)
    assert options.replication_factor == 2
    assert (options.Distributed.processId, options.Distributed.numProcesses) == (1, 2)
    folder = emit(_plan(), settings, tmp_path / "bundle")
    monkeypatch.syspath_prepend(str(folder))
    run: dict[str, Any] = {"__name__": "bundle", "__file__": str(folder / "run.py")}
    exec((folder / "run.py").read_text(), run)
    assert run["local_settings"](flat) == {**flat, "replication_factor": 2, "instance": 1}
    with pytest.raises(ValueError, match="given --num-replicas 4, the plan has 8; make them equal"):
        run["local_settings"]({**flat, "replication_factor": 8})
    popdist.isPopdistEnvSet = lambda: False
    assert started_by_poprun() is None
    assert run["local_settings"](flat)["instance"] == 0
    for name in [name for name in sys.modules if name.split(".")[0] == "runtime"]:
        monkeypatch.delitem(sys.modules, name)
