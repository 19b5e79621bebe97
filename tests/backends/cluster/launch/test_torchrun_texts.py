"""The command of a node and the Slurm file: what torchrun, bash and sbatch make of them."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.run import config_from_args, parse_args

from ipu_pipeline.backends.cluster.launch.spec import LaunchSpec
from ipu_pipeline.backends.cluster.launch.torchrun import node_command, slurm_file

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


# ---------------------------------------------------------------- the command of a node


def in_words(text: str) -> list[str]:
    return shlex.split(text.replace("\\\n", ""))


def parsed(text: str):
    """Return what torchrun makes of the arguments in a command."""
    words = in_words(text.partition(":\n")[2])
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
    words = in_words(text.partition(":\n")[2])
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
    assert text.startswith(
        "# 8 processes: 4 stages x 2 replicas, 1f1b\n# run this on this machine:\ncd /home/me"
    )


def test_the_command_runs_in_a_shell(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS"\nfor word; do echo "$word"; done\npwd\n')
    fake.chmod(0o755)
    told = node_command(SPEC, python=str(fake), folder=tmp_path, run_id="ipu-1", endpoint="node1:1")
    assert "# run this on each of the 2 nodes, in any order; node1 is one of them" in told
    without = subprocess.run(["bash", "-c", told], capture_output=True, text=True, check=False)
    assert "IPU_PIPELINE_JOB_SECRET: set it to one random text on every node" in without.stderr
    secret = {**os.environ, "IPU_PIPELINE_JOB_SECRET": "a1b2"}
    done = subprocess.run(
        ["bash", "-c", told], capture_output=True, text=True, check=True, env=secret
    )
    threads, *words, folder = done.stdout.splitlines()
    assert int(threads) >= 1
    assert words[-3:] == list(SPEC.program)
    assert folder == str(tmp_path)
    fake.write_text('#!/bin/sh\necho "${#IPU_PIPELINE_JOB_SECRET}"\n')
    alone = node_command(
        replace(SPEC, num_nodes=1), python=str(fake), folder=tmp_path, run_id="i", endpoint="n"
    )
    done = subprocess.run(["bash", "-c", alone], capture_output=True, text=True, check=True)
    assert done.stdout == "64\n"
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


# ---------------------------------------------------------------- nodes that are not alike

UNEVEN = replace(SPEC, num_processes=5, num_nodes=3, described="5 processes")


def test_nodes_with_a_process_less_have_a_command_of_their_own(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, _, second = command(UNEVEN).partition("\n# and this on the other 1:\n")
    assert "# run this on 2 of the 3 nodes, in any order; node1 is one of them" in first
    assert [parsed(text)[0].nproc_per_node for text in (first, f":\n{second}")] == [2, 1]
    assert parsed(first)[0].max_nodes == 3


def test_every_nodes_shell_counts_its_own_processes(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node7\n")
    (tmp_path / "srun").write_text(
        '#!/bin/sh\nshift 3\nfor node in 0 1 2; do SLURM_NODEID=$node "$@"; done\n'
    )
    python = tmp_path / "my python"
    python.write_text('#!/bin/sh\nfor word; do printf "%s|" "$word"; done\necho\n')
    for path in (tmp_path / "scontrol", tmp_path / "srun", python):
        path.chmod(0o755)
    text = slurm_file(UNEVEN, python=str(python), folder=tmp_path, name="n")
    assert "# 5 processes; 2 on 2 of 3 nodes, 1 on the others." in text
    told = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "", "SLURM_JOB_ID": "1"}
    done = subprocess.run(
        ["bash", "-c", text], env=told, capture_output=True, text=True, check=True
    )
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert [line[line.index("--nproc-per-node") + 1] for line in lines] == ["2", "2", "1"]
    assert all(line[line.index("--rdzv-endpoint") + 1] == "node7:20001" for line in lines)
    assert all(line[-4:-1] == list(SPEC.program) for line in lines)


# ---------------------------------------------------------------- names that strangers choose


@pytest.mark.parametrize("text", ["$(touch {0})", "'; touch {0}; '", "`touch {0}`", "a b\\"])
def test_names_are_no_shell_code(tmp_path: Path, text: str) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    mark = tmp_path / "mark"
    text = text.format(mark)
    spec = replace(SPEC, plan_path=Path(text), program=(text, text), num_nodes=1)
    for written in (
        node_command(spec, python=str(python), folder=tmp_path, run_id=text, endpoint=text),
        slurm_file(spec, python=str(python), folder=tmp_path, name=text),
    ):
        subprocess.run(["bash", "-c", written], capture_output=True, cwd=tmp_path, check=False)
        assert not mark.exists()


def test_a_job_name_is_one_word() -> None:
    text = slurm_file(SPEC, python=PYTHON, folder=Path("/home/me"), name="A\n#SBATCH --x; y")
    assert "#SBATCH --job-name=A__SBATCH_--x__y\n" in text


@pytest.mark.parametrize("where", ["plan", "program", "python"])
def test_control_characters_are_refused(where: str) -> None:
    bad = "a\nrm -rf b"
    spec = replace(
        SPEC,
        plan_path=Path(bad if where == "plan" else "/plan.json"),
        program=(bad if where == "program" else "/a.py",),
    )
    python = bad if where == "python" else PYTHON
    with pytest.raises(ValueError, match="has control characters"):
        slurm_file(spec, python=python, folder=Path("/home/me"), name="n")
    with pytest.raises(ValueError, match="has control characters"):
        node_command(spec, python=python, folder=Path("/home/me"), run_id="1", endpoint="n1")
