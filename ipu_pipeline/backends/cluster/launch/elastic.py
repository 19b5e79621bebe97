"""Start the processes through torch's elastic launcher (what ``torchrun`` is made of)."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.api import LogsDest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ipu_pipeline.backends.cluster.launch.spec import LaunchSpec
from ipu_pipeline.backends.cluster.launch.streams import Follower, Merger

_LOGGER = "torch.distributed.elastic"
# A shell's exit code for a process that a signal has ended.
_SIGNALLED = 128
# Sent to the launcher, they reach every process, and it waits for them to end.
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def count_gpus() -> int:
    """Return how many GPUs torch sees on this machine."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def start(
    spec: LaunchSpec,
    environment: Mapping[str, str],
    tell: Callable[[str], None],
    log_folder: Path | None = None,
) -> int:
    """Start the processes on this machine, wait for them, and return the script's exit code.

    The first rank's standard output stays what it is here, a terminal included. What the others
    write there goes to files only; see ``streams.py`` for messages. Signals are passed on.

    Args:
        spec: What to start.
        environment: Set for the processes besides this process's own environment.
        tell: Shows text to the user, as it is.
        log_folder: Keep the files of all ranks here; ``None`` keeps them only after a failure, in
            a temporary folder.

    Returns:
        0; or that of the rank that failed first, 128 + N if signal N ended it or the launch.
    """
    if log_folder is not None:
        return _start(spec, environment, tell, log_folder)
    folder = Path(tempfile.mkdtemp(prefix="ipu-pipeline-launch-"))
    code = _start(spec, environment, tell, folder)
    if code == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _start(
    spec: LaunchSpec, environment: Mapping[str, str], tell: Callable[[str], None], folder: Path
) -> int:
    merger = Merger(tell)
    logs = _Logs(folder, spec, Follower(merger), tell)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=spec.num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",  # nothing has to know this machine by its name
        max_restarts=spec.max_restarts,
        logs_specs=logs,
        signals_to_handle=",".join(number.name for number in _PASSED_ON),
    )
    try:
        with _variables(environment), _logged_by(logs.failures), _signals_restored():
            elastic_launch(config, sys.executable)("-u", *spec.program)
    except ChildFailedError as error:
        logs.follower.stop()
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        words = merger.last_words(rank)
        tell(
            f"error: rank {rank} {_how_it_ended(code)}{words and f'; its last message: {words}'}\n"
            f"what every rank wrote: {logs.run_folder}\n"
        )
        return code if code > 0 else _SIGNALLED - code
    except SignalException as stopped:
        logs.follower.stop()
        tell(f"error: stopped by {stopped.sigval.name}; what every rank wrote: {logs.run_folder}\n")
        return _SIGNALLED + stopped.sigval
    finally:
        logs.follower.stop()
    return 0


class _Failures(logging.Handler):
    """Keeps the launcher's last error: it says which process made the others start again."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


class _Logs(DefaultLogsSpecs):
    """Sends messages of all ranks, and all other output but the first rank's, to files.

    Args:
        folder: Of the files.
        spec: What is started.
        follower: Is told about the files of every start.
        tell: Shows text to the user.
    """

    def __init__(
        self, folder: Path, spec: LaunchSpec, follower: Follower, tell: Callable[[str], None]
    ) -> None:
        others = dict.fromkeys(range(1, spec.num_processes), Std.ALL)
        super().__init__(log_dir=str(folder), redirects={0: Std.ERR, **others})
        self.follower = follower
        self.failures = _Failures()
        self.run_folder = folder
        self._max_restarts = spec.max_restarts
        self._tell = tell

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Make the files of one start of the processes."""
        self.follower.stop()
        restart = int(envs[0]["TORCHELASTIC_RESTART_COUNT"])
        if restart:
            self._tell(
                f"launch: {self.failures.last}\n"
                f"launch: all processes start again, restart {restart} of {self._max_restarts}\n"
            )
        files = super().reify(envs)
        self.run_folder = Path(files.stderrs[0]).parents[2]
        self.follower.follow({rank: Path(name) for rank, name in files.stderrs.items()})
        return files


def _how_it_ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"


@contextlib.contextmanager
def _logged_by(handler: logging.Handler) -> Iterator[None]:
    """Give the launcher's own messages to ``handler`` and to nobody else."""
    logger = logging.getLogger(_LOGGER)
    before = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    """Take back the signal handlers that the launcher sets, where it can set any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
