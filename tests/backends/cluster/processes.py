"""Processes that stay up for many checks: every one runs the same job of ``jobs.py``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

ROOT = Path(__file__).resolve().parents[3]
# Of the plans that the processes of a test run share; processes inherit the name of the folder.
PLANS = "IPU_PIPELINE_TEST_PLANS"
if PLANS not in os.environ:
    _plans = tempfile.TemporaryDirectory(prefix="ipu-pipeline-plans-")
    os.environ[PLANS] = _plans.name
# A process of tests has one server for all; tools.coverage uses it, too.
PRELOADED = ["tests.tools.coverage.fates", "tools.coverage.check", "tests.backends.cluster.preload"]
# Only what hangs waits so long: a slow machine must not fail.
ANSWER_S = 240.0
# Below those that the kernel gives to connections, so that none takes one before it is used;
# every process of the tests begins elsewhere.
PORTS = iter(range(10_000 + 89 * os.getpid() % 20_000, 32_000))


def free_port() -> int:
    for port in PORTS:
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@functools.cache
def start_server() -> None:
    """Start the server of :func:`forked`, in the main thread, for it changes the environment."""
    forkserver.set_forkserver_preload(PRELOADED)
    # It imports from here.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()


def forked(target: Callable[..., Any], *arguments: Any) -> Any:
    """Start a process that is forked from a server that has imported everything once."""
    start_server()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


class Processes:
    """``world_size`` gloo processes with one thread each.

    An answer may take ``answer_s`` seconds. They start with the first job, and again with the one
    that follows a failure.
    """

    def __init__(self, world_size: int, *, joined: bool = True, answer_s: float = ANSWER_S) -> None:
        self.world_size = world_size
        self.joined = joined
        self.answer_s = answer_s
        self.muted: set[int] = set()
        self.failed = False
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = multiprocessing.Pipe()
            process = forked(_serve, rank, self.world_size, port, theirs, self.joined)
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, job: str, **arguments: Any) -> list[Any]:
        """Return what the job returned on every rank."""
        answers = self.answers(job, **arguments)
        failed = [f"rank {rank}: {text}" for rank, (good, text) in enumerate(answers) if not good]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def answers(
        self, job: str, *, mute: tuple[int, ...] = (), **arguments: Any
    ) -> list[tuple[bool, Any]]:
        """Return per rank whether the job ended well, and its result or error.

        Ranks that are ``mute`` cannot answer and are not waited for.
        """
        if self.failed:
            self.close()
        if not self.processes:
            self.start()
        self.failed = True
        self.muted |= set(mute)
        for pipe in self.pipes:
            pipe.send((job, arguments))
        found = []
        for rank, pipe in enumerate(self.pipes):
            if rank in mute:
                found.append((False, "mute"))
                continue
            try:
                assert pipe.poll(self.answer_s), "a rank does not answer"
                found.append(pipe.recv())
            except EOFError:
                found.append((False, "died"))
        self.failed = not all(good for good, _ in found)
        return found

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()
        for rank, process in enumerate(self.processes):
            if rank not in self.muted:
                process.join(timeout=5)
            process.kill()
        self.pipes, self.processes, self.muted, self.failed = [], [], set(), False


def _find(job: str) -> Callable[..., Any]:
    """Return a function of ``jobs.py``, or ``other_module.function``."""
    module, _, name = job.rpartition(".")
    found: Callable[..., Any] = getattr(
        importlib.import_module(f"tests.backends.cluster.{module or 'jobs'}"), name
    )
    return found


def _serve(rank: int, world_size: int, port: int, pipe: Connection, joined: bool) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    if joined:
        dist.init_process_group("gloo")
    while True:
        try:
            job, arguments = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            pipe.send((True, _find(job)(**arguments)))
        except Exception as error:
            text = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
            pipe.send((False, text))


def launch(folder: Path, logs: str, program: tuple[str, ...], changes: dict[str, int]) -> NoReturn:
    """Start the program in two processes, in a process of its own; both streams are files."""
    from ipu_pipeline.backends.cluster.launch.spec import LaunchSpec
    from ipu_pipeline.backends.cluster.launch.torchrun import start

    os.chdir(folder)
    os.environ |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    tempfile.tempdir = None
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream)
    spec = LaunchSpec(
        folder / "plan.json", program, described="", **{"num_processes": 2, **changes}
    )
    tell = partial(print, file=sys.stderr)
    sys.exit(start(spec, spec.settings(), tell, Path(logs) if logs else None))
