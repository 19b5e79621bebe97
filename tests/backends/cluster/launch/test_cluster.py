"""Several machines: how the processes share them, and the texts that start them."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.run import config_from_args, parse_args

from ipu_pipeline.backends.cluster.launch.cluster import (
    Nodes,
    choose_nodes,
    described_command,
    node_command,
    slurm_file,
)
from ipu_pipeline.backends.cluster.launch.request import Request, make_spec
from ipu_pipeline.backends.cluster.launch.spec import LaunchSpec
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.machines import machine_by_name

SPEC = LaunchSpec(
    plan_path=Path("/home/me/my plans/plan.json"),
    program=("/home/me/train.py", "--text", "it's here"),
    num_processes=8,
    described="8 processes: 4 stages x 2 replicas, 1f1b",
    num_nodes=2,
    gpus_per_node=4,
    max_restarts=3,
)
PYTHON = "/opt/my env/bin/python"


def command(spec: LaunchSpec, endpoint: str = "node1") -> str:
    return node_command(
        spec, python=PYTHON, folder=Path("/home/me"), run_id="ipu-1", endpoint=endpoint
    )


def slurm(spec: LaunchSpec = SPEC) -> str:
    return slurm_file(spec, python=PYTHON, folder=Path("/home/me"), name="ipu-pipeline-Tiny")


@pytest.mark.parametrize(
    ("processes", "nodes", "gpus", "machine", "expected"),
    [
        (8, None, None, None, (1, 0)),
        (8, 2, None, None, (2, 0)),
        (8, 4, 8, None, (4, 8)),
        (8, None, 4, None, (2, 4)),
        (12, None, 8, None, (2, 8)),
        (9, None, 4, None, (3, 4)),
        (16, None, None, "a100-80g-x16", (2, 8)),
        (4, None, None, "a100-80g-x4", (1, 8)),
        (8, None, 4, "a100-80g-x16", (2, 4)),
    ],
)
def test_nodes(processes, nodes, gpus, machine, expected) -> None:
    described = None if machine is None else machine_by_name(machine)
    assert choose_nodes(processes, nodes, gpus, described) == Nodes(*expected)


@pytest.mark.parametrize(
    ("processes", "nodes", "gpus", "machine", "message"),
    [
        (8, 3, None, None, "8 processes cannot be shared evenly by 3 nodes; use 1, 2, 4, 8 nodes"),
        (8, 2, 2, None, "8 processes on 2 nodes need 4 GPUs per node, and a node has 2"),
        (8, None, None, "pod16", "machine pod16 has IPUs, .* ipu-pipeline emit"),
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
    made = make_spec(plan, path, ("/a.py",), Request(here=False))
    assert (made.num_nodes, made.gpus_per_node) == (2, 8)
    made = make_spec(plan, path, ("/a.py",), Request(here=False, nodes=4))
    assert (made.num_nodes, made.gpus_per_node) == (4, 0)
    made = make_spec(plan, path, ("/a.py",), Request(), room=1)
    assert (made.num_nodes, made.gpus_per_node) == (1, 0)
    request = Request(here=False, schedule="looped_bfs", nodes=2, gpus_per_node=2)
    assert make_spec(plan, path, ("/a.py",), request).num_processes == 4
    request = Request(here=False, schedule="looped_bfs", nodes=2)
    assert make_spec(plan, path, ("/a.py",), request).num_processes == 8


# ---------------------------------------------------------------- the command of a node


def in_words(text: str) -> list[str]:
    return shlex.split(text.replace("\\\n", ""))


def parsed(text: str):
    """Return what torchrun makes of the arguments in a command."""
    words = in_words(text)
    config, _, arguments = config_from_args(
        parse_args(words[words.index("torch.distributed.run") + 1 :])
    )
    return config, arguments


def test_torchrun_understands_the_command(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = command(SPEC)
    config, arguments = parsed(text)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 4)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "node1:29400")
    assert (config.run_id, config.max_restarts) == ("ipu-1", 3)
    assert arguments == ["-u", *SPEC.program]
    words = in_words(text)
    assert words[:3] == ["cd", "/home/me", "&&"]
    assert "IPU_PIPELINE_PLAN=/home/me/my plans/plan.json" in words
    assert "IPU_PIPELINE_TARGET=distributed" in words
    assert parsed(command(SPEC, "10.0.0.1:5000"))[0].rdzv_endpoint == "10.0.0.1:5000"


def test_one_node_meets_itself(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    module = replace(SPEC, num_nodes=1, num_processes=1, program=("-m", "mine", "-x"))
    text = command(module)
    assert "--standalone" in text
    assert "--redirects" not in text
    config, arguments = parsed(text)
    assert (config.max_nodes, config.nproc_per_node) == (1, 1)
    assert arguments == ["-u", "-m", "mine", "-x"]
    assert described_command(module, text, "node1").startswith(
        "# 8 processes: 4 stages x 2 replicas, 1f1b\n# run this on this machine:\ncd /home/me"
    )


def test_the_command_runs_in_a_shell(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS"\nfor word; do echo "$word"; done\npwd\n')
    fake.chmod(0o755)
    text = node_command(SPEC, python=str(fake), folder=tmp_path, run_id="ipu-1", endpoint="node1:1")
    told = described_command(SPEC, text, "node1:1")
    assert "# run this on each of the 2 nodes, in any order; node1 is one of them" in told
    done = subprocess.run(["bash", "-c", told], capture_output=True, text=True, check=True)
    threads, *words, folder = done.stdout.splitlines()
    assert int(threads) >= 1
    assert words[-3:] == list(SPEC.program)
    assert folder == str(tmp_path)
    fixed = command(replace(SPEC, num_threads=5))
    assert "env OMP_NUM_THREADS=5 " in fixed


# ---------------------------------------------------------------- Slurm


def test_the_slurm_file_is_pinned(golden) -> None:
    golden("launch.sbatch", slurm())


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_nodes": 1, "num_processes": 1, "gpus_per_node": 0}, {"num_threads": 5}],
)
def test_bash_reads_the_slurm_file(tmp_path: Path, changes) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(slurm(replace(SPEC, **changes)))
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_slurm_file_starts_torchrun_on_every_node(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node7\necho node8\n")
    (tmp_path / "srun").write_text(
        '#!/bin/sh\necho "$OMP_NUM_THREADS $IPU_PIPELINE_PLAN"\nfor word; do echo "$word"; done\n'
    )
    # Ten cores of two threads each.
    (tmp_path / "lscpu").write_text('#!/bin/sh\necho "# c"; seq 0 9; seq 0 9\n')
    for name in ("lscpu", "scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    text = slurm_file(SPEC, python=PYTHON, folder=tmp_path, name="n")
    told = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "1234567",
    }
    done = subprocess.run(
        ["bash", "-c", text], env=told, capture_output=True, text=True, check=True
    )
    first, *words = done.stdout.splitlines()
    assert first == "2 /home/me/my plans/plan.json"
    assert words[:4] == ["--label", "--kill-on-bad-exit=1", "--cpu-bind=none", PYTHON]
    assert words[words.index("--rdzv-endpoint") + 1] == "node7:24567"
    assert words[words.index("--rdzv-id") + 1] == "1234567"
    assert words[-3:] == list(SPEC.program)


def test_options_of_slurm_follow_the_nodes() -> None:
    assert "#SBATCH --gpus-per-node=4\n" in slurm()
    assert "#SBATCH --requeue\n" in slurm()
    plain = slurm(replace(SPEC, gpus_per_node=0, max_restarts=0, num_threads=5))
    assert "gpus" not in plain
    assert "requeue" not in plain
    assert "export OMP_NUM_THREADS=5\n" in plain
