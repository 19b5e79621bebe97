"""Processes that stay up for many checks: every one runs the same job of ``jobs.py``."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
# Of the plans that the processes of a test run share; processes inherit the name of the folder.
PLANS = "IPU_PIPELINE_TEST_PLANS"
if PLANS not in os.environ:
    _plans = tempfile.TemporaryDirectory(prefix="ipu-pipeline-plans-")
    os.environ[PLANS] = _plans.name
ANSWER_S = 60.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Processes:
    """``world_size`` gloo processes with one thread each.

    They are forked from a server that has imported everything once. An answer may take
    ``answer_s`` seconds.
    """

    def __init__(self, world_size: int, *, joined: bool = True, answer_s: float = ANSWER_S) -> None:
        self.answer_s = answer_s
        self.muted: set[int] = set()
        os.environ["PYTHONPATH"] = str(ROOT)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.backends.cluster.jobs"])
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, port, theirs, joined), daemon=True
            )
            process.start()
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
        return found

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for rank, process in enumerate(self.processes):
            if rank not in self.muted:
                process.join(timeout=5)
            process.kill()


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
