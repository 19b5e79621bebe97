"""A process that holds contestants and steps one when it is told to.

Started by :mod:`benchmarks.suite.contest`, alone or as one of a job. Reads one JSON object per line
from stdin and answers each with one line on stdout; between them it sleeps. What libraries print
goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import transformers

from benchmarks.memory_probe import reset_peak, resident_bytes
from benchmarks.processes import Times, everyones, is_started
from benchmarks.suite.contestants import Trained, UnavailableError, make
from benchmarks.suite.material import Batch, Material, make_batch, make_material
from benchmarks.suite.workloads import MANY_PROCESSES, Contestant, Workload


class Worker:
    """Answers commands.

    Args:
        job: Fields of the workload, precision, and number of threads.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self._workload = Workload(**job["workload"])
        self._precision: str = job["precision"]
        self._made: dict[str, Trained] = {}
        self._shared: Material | None = None
        self._batches = {
            count: make_batch(self._workload, count)
            for count in (self._workload.check_microbatches, self._workload.microbatches)
        }

    def answer(self, command: Mapping[str, Any]) -> Any:
        """Do what a command says and return what it asks for."""
        actions: dict[str, Callable[..., Any]] = {
            "make": self._make,
            "loss": self._loss,
            "warm": self._warm,
            "step": self._step,
            "memory": self._memory,
        }
        return actions[command["do"]](command["name"], **command.get("with", {}))

    def _make(self, name: str, contestant: Mapping[str, Any]) -> str | None:
        """Make a contestant; return why it cannot run here, or nothing."""
        kind = Contestant(**contestant)
        if self._shared is None and kind.kind not in MANY_PROCESSES:
            self._shared = make_material(self._workload, self._precision)
        try:
            self._made[name] = make(kind, self._workload, self._precision, self._shared)
        except UnavailableError as error:
            return str(error)
        return None

    @property
    def _small(self) -> Batch:
        return self._batches[self._workload.check_microbatches]

    def _loss(self, name: str) -> float:
        """Return the loss of a small batch without dropout; nothing is trained."""
        return self._made[name].loss(self._small)

    def _warm(self, name: str) -> None:
        """Take a step with a small batch: captures, compilation and first messages are over."""
        self._made[name].step(self._small)

    def _step(self, name: str) -> float:
        """Return the seconds of a step."""
        batch = self._batches[self._workload.microbatches]
        times = Times()
        times.run(lambda: self._made[name].step(batch))
        return times.seconds[0]

    def _memory(self, name: str, steps: int) -> dict[str, Any]:
        """Return seconds, and the peak resident bytes of every process, of some steps."""
        self._step(name)
        reset_peak()
        seconds = [self._step(name) for _ in range(steps)]
        peak = resident_bytes("VmHWM")
        return {"seconds": seconds, "bytes": everyones(peak) if is_started() else [peak]}


def main() -> None:
    """Answer until there are no more commands."""
    # Nothing but answers may reach the pipe, whatever a library prints.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    transformers.logging.set_verbosity_error()
    if is_started():
        dist.init_process_group("gloo")
    worker = Worker(json.loads(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)
    # Targets and groups would wait for each other; there is nothing left to lose.
    os._exit(0)


if __name__ == "__main__":
    main()
