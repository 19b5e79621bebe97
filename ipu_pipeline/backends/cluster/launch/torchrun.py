"""The processes of a plan under ``torchrun``: started here, or as a command or a Slurm file."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ipu_pipeline.backends.cluster.launch.spec import SECRET_VARIABLE, STORE_VARIABLE, LaunchSpec
from ipu_pipeline.errors import INTERRUPTED

# Where torchrun's rendezvous listens unless it is told otherwise.
PORT = 29400
# Physical cores of a node, in a shell: two threads of one core count once.
_CORES = "$(lscpu --parse=CORE,SOCKET | grep -v '#' | sort -u | wc -l)"
# A random text, drawn by a shell.
_SECRET = "$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')"
# Between the lines of a command.
_BREAK = " \\\n    "
# Neither torchrun's agent nor gloo listens on another interface; a user's own setting wins.
_ON_LOOPBACK = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "GLOO_SOCKET_IFNAME": next((n for _, n in socket.if_nameindex() if n.startswith("lo")), "lo"),
}
# A launch's folder in the temporary one, where its processes meet, and what says that it lives.
_PREFIX, _POINT, _LOCK = "ipu-pipeline-launch-", ".meeting", ".lock"
# How a rank says that another one is why it has stopped.
_BLAMED = re.compile(r"St(?:age|all)Error: (?P<text>rank \d+ .*)", re.DOTALL)
_ENDPOINT = re.compile(r"(?P<host>\[[\w:.%]+\]|[\w.-]+)(:(?P<port>\d{1,5}))?")
# A shell's exit code for a process that a signal has ended.
_SIGNALLED = 128


def start(
    spec: LaunchSpec,
    environment: Mapping[str, str],
    tell: Callable[[str], None],
    log_folder: Path | None = None,
) -> int:
    """Start the processes on this machine, wait for them, and return the script's exit code.

    ``torchrun`` starts them, starts all again if one fails, passes signals on, and puts the rank
    before every line of the others' standard error. What the others write to standard output goes
    to files only. The first rank keeps this process's streams, a terminal included, unless
    everything is kept in ``log_folder``. This process's environment and signal handlers are
    changed: it has nothing else to do afterwards.

    Args:
        spec: What to start.
        environment: Set for the processes besides this process's own environment.
        tell: Shows a line to the user.
        log_folder: Keep the files of all ranks here; ``None`` keeps those of the others, and only
            after a failure, in a temporary folder.

    Ctrl-C ends the ranks by SIGTERM: they say nothing then.

    Returns:
        0; or that of the rank that failed first, 128 + N if signal N ended it or the launch.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    store, where = _loopback_store()
    os.environ.update({**_ON_LOOPBACK, **environment})
    os.environ.update({STORE_VARIABLE: where, SECRET_VARIABLE: secrets.token_hex(32)})
    own, lock = _own_folder()
    folder, code = log_folder or own, 0
    first = {} if log_folder is None else {0: 3}
    try:
        signal.signal(signal.SIGINT, _interrupt)
        run(parse_args([*_arguments(spec, own / _POINT, folder, first), *spec.program]))
    except ChildFailedError as error:
        code, text = _failure(error)
        tell(f"{text}\nwhat the ranks wrote: {folder}")
    except SignalException as stopped:
        code, text = INTERRUPTED, "interrupted"
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            code = _SIGNALLED + int(stopped.sigval)
            text = f"error: stopped by {stopped.sigval.name}"
        tell(f"{text}; what the ranks wrote: {folder}")
    finally:
        del store  # until here the processes have met through it
        for name in (_POINT, _LOCK):
            (own / name).unlink(missing_ok=True)
        lock.release()  # behind that: the next launch takes what is unlocked for left behind
        if code == 0 or log_folder is not None:
            shutil.rmtree(own, ignore_errors=True)
    return code


def _failure(error: Any) -> tuple[int, str]:
    """Return the exit code of the rank that failed first, and why it did."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    how = f"with exit code {code}" if code > 0 else f"by {failure.signal_name()}"
    # What torch's ``record`` has written, or the watchdog; otherwise only torch's own text.
    said: Any = failure.message
    why = str(said["message"]) if isinstance(said, dict) else ""
    blamed = _BLAMED.match(why)
    if blamed is None:
        return code if code > 0 else _SIGNALLED - code, (
            f"error: rank {rank} ended {how}{why and ': ' + why}"
        )
    # This one may only have been the first to end, or was ended while it said why.
    return max(code, 1), f"error: {blamed['text']}"


def _own_folder() -> tuple[Path, FileLock]:
    """Make this launch's folder and hold its lock; what killed launches have left is removed.

    Where there is no lock, a launch has failed, and its user was told where to look.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError, Timeout):
            if path.parent.lstat().st_uid == os.getuid():  # nobody else can have put it there
                with FileLock(path).acquire(timeout=0):
                    shutil.rmtree(path.parent)
    made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    lock = FileLock(made / _LOCK)
    lock.acquire()
    return made.rename(made.with_name(made.name[1:])), lock  # now it is found, and locked


def _interrupt(*_: Any) -> None:
    """Let torchrun's agent end the ranks, once, without its lines about each of them."""
    from torch.distributed.elastic.multiprocessing import SignalException

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.ERROR)
    raise SignalException("interrupted", signal.SIGTERM)


def _arguments(spec: LaunchSpec, point: Path, folder: Path, first: Mapping[int, int]) -> list[str]:
    """Return torchrun's own arguments; ``first``: the streams of rank 0 that are kept, too."""
    others = range(1, spec.num_processes)
    return [
        *("--local-addr", "localhost", "--role", "rank", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", str(point), "--rdzv-conf", "store_type=file"),
        *("--nproc-per-node", str(spec.num_processes)),
        *("--max-restarts", str(spec.max_restarts), "--log-dir", str(folder)),
        *("--signals-to-handle", "SIGTERM,SIGHUP,SIGQUIT"),  # Ctrl-C is handled by _interrupt
        *_streams("--tee", {**first, **dict.fromkeys(others, 2)}),
        *_streams("--redirects", dict.fromkeys(others, 1)),
    ]


def _loopback_store() -> tuple[Any, str]:
    """Return a store that only this machine reaches, and its address."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    store = TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    return store, f"127.0.0.1:{port}"


def node_command(spec: LaunchSpec, *, python: str, folder: Path, run_id: str, endpoint: str) -> str:
    """Return the shell command that starts a node's processes, below comments that say where.

    Nodes with one process less than others have a command of their own.

    Args:
        spec: What to start.
        python: Interpreter that has torch.
        folder: Where it is started: relative paths in the arguments begin here.
        run_id: Tells this run from others at the same rendezvous.
        endpoint: ``host`` or ``host:port`` of the first node; unused for a single node.

    Raises:
        ValueError: A name has control characters, or the endpoint is none.
    """
    host, port = _host_and_port(endpoint) if spec.num_nodes > 1 else ("", "")
    number, full = spec.processes_per_node, spec.num_full_nodes
    others = spec.num_nodes - full
    where = "on this machine"
    if spec.num_nodes > 1:
        where = (
            f"on {full if others else 'each'} of the {spec.num_nodes} nodes, in any order; "
            f"{host} is one of them; all see plan and script under these paths"
        )
    threads = [f"env OMP_NUM_THREADS={spec.num_threads}"]
    if spec.num_threads is None:
        threads = [f"cores={_CORES} &&", f"env OMP_NUM_THREADS={_share(spec)}"]
    lines = [f"cd {_quoted(str(folder))} &&", *threads, *_settings(spec)]
    secret = _SECRET  # it signs what the processes tell each other, and is not shown here
    if spec.num_nodes > 1:
        secret = f'"${{{SECRET_VARIABLE}:?set it to one random text on every node}}"'
    lines.append(f"{SECRET_VARIABLE}={secret}")
    ends = [
        _torchrun(spec, python, _quoted(run_id), _quoted(f"{host}:{port or PORT}"), str(count))
        for count in (number, number - 1)
    ]
    text = f"# {spec.described}\n# run this {where}:\n" + _BREAK.join([*lines, *ends[0]])
    if others:
        text += f"\n# and this on the other {others}:\n" + _BREAK.join([*lines, *ends[1]])
    return text


def slurm_file(spec: LaunchSpec, *, python: str, folder: Path, name: str) -> str:
    """Return a complete file for ``sbatch``.

    Args:
        spec: What to start.
        python: Interpreter that has torch, on every node.
        folder: Where it is started.
        name: Of the job; what is no letter, digit or one of ``_.-`` becomes ``_``.

    Raises:
        ValueError: A path or an argument has control characters.
    """
    name = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    options = [
        f"--job-name={name}",
        f"--nodes={spec.num_nodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        f"--output={name}-%j.log",
    ]
    if spec.gpus_per_node:
        options.append(f"--gpus-per-node={spec.gpus_per_node}")
    if spec.max_restarts:
        # Restarts are for processes; a node that is lost brings the whole job back.
        options += ["--requeue", "--open-mode=append"]
    threads = [f"export OMP_NUM_THREADS={spec.num_threads}"]
    if spec.num_threads is None:
        threads = ["", "# The processes of a node share its cores.", f"cores={_CORES}"]
        threads.append(f"export OMP_NUM_THREADS={_share(spec)}")
    number, full = spec.processes_per_node, spec.num_full_nodes
    command = _BREAK.join(_torchrun(spec, python, '"$SLURM_JOB_ID"', '"$endpoint"', str(number)))
    shared = f"{number} on every node"
    if full < spec.num_nodes:  # every node's shell counts its own
        shared = f"{number} on {full} of {spec.num_nodes} nodes, {number - 1} on the others"
        count = f"$(({number - 1} + (SLURM_NODEID < {full})))"
        lines = _torchrun(spec, python, '"$SLURM_JOB_ID"', '"$endpoint"', count)
        command = f"bash -c {shlex.quote('exec ' + ' '.join(lines))}"
    lines = [
        "#!/bin/bash",
        f"# {spec.described}; {shared}.",
        f"# Written by ipu-pipeline launch from {_plain(str(spec.plan_path))}.",
        "# Partition, account and time are yours to add, here or to sbatch's arguments.",
        *(f"#SBATCH {option}" for option in options),
        "",
        "set -euo pipefail",
        f"cd {_quoted(str(folder))}",
        "",
        *(f"export {setting}" for setting in _settings(spec)),
        "# It signs what the processes tell each other.",
        f"export {SECRET_VARIABLE}={_SECRET}",
        *threads,
        "",
        "# The processes meet on the first node; the port differs from job to job.",
        'read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "export endpoint=$first_node:$((20000 + SLURM_JOB_ID % 10000))",
        "",
        "# One torchrun per node, on all of its cores; a signal reaches every process.",
        f"srun --label --kill-on-bad-exit=1 --cpu-bind=none{_BREAK}{command}",
    ]
    return "\n".join(lines) + "\n"


def _torchrun(spec: LaunchSpec, python: str, run_id: str, endpoint: str, number: str) -> list[str]:
    """Return the lines of the command for ``number`` processes, all quoted for a shell."""
    lines = [f"{_quoted(python)} -m torch.distributed.run"]
    if spec.num_nodes == 1:
        lines.append("--standalone")
    else:
        lines.append(f"--nnodes {spec.num_nodes} --rdzv-id {run_id}")
        lines.append(f"--rdzv-backend c10d --rdzv-endpoint {endpoint}")
    lines.append(f"--nproc-per-node {number} --max-restarts {spec.max_restarts}")
    # One process per node prints; warnings and errors (stderr) are seen of all.
    if quiet := _streams("--redirects", dict.fromkeys(range(1, spec.processes_per_node), 1)):
        lines.append(" ".join(quiet))
    return [*lines, " ".join(map(_quoted, spec.program))]


def _streams(option: str, of_ranks: Mapping[int, int]) -> list[str]:
    """Return an option of torchrun: 1 is a rank's standard output, 2 its standard error, 3 both."""
    return [option, ",".join(f"{r}:{s}" for r, s in of_ranks.items())] if of_ranks else []


def _settings(spec: LaunchSpec) -> list[str]:
    return [f"{name}={_quoted(value)}" for name, value in spec.settings().items()]


def _share(spec: LaunchSpec) -> str:
    """Return a process's share of the shell's ``$cores``, at least 1, as shell arithmetic."""
    number = spec.processes_per_node
    return f"$((cores / {number} + (cores < {number})))"


def _quoted(text: str) -> str:
    return shlex.quote(_plain(text))


def _host_and_port(endpoint: str) -> tuple[str, str]:
    """Return the two parts of an endpoint; the second is empty where it is left out.

    Raises:
        ValueError: It has others.
    """
    found = _ENDPOINT.fullmatch(_plain(endpoint))
    if found is None or not 1 <= int(found["port"] or 1) < 1 << 16:
        raise ValueError(
            f"the endpoint is {endpoint!r}; give HOST or HOST:PORT with a port from 1 to 65535, an "
            "IPv6 address in brackets, such as [fe80::1]:29400"
        )
    return found["host"], found["port"] or ""


def _plain(text: str) -> str:
    """Refuse what would end a comment or a line of the text that is written."""
    if not text.isprintable():
        raise ValueError(
            f"{text!r} has control characters, which a command or a Slurm file cannot hold; rename "
            "it, or put it into a file that the script reads"
        )
    return text
