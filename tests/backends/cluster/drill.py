"""Kill -9 of a rank at random points; the run must end as if nothing had happened.

``python -m tests.backends.cluster.drill --points 10`` kills a rank at 10 points each of the
forward pass, the backward pass, the optimizer step and the writing of a checkpoint. Torch's elastic
agent (what ``torchrun`` runs) starts the processes again. A restarted run must reach the same
losses and weights bit for bit as one that was left alone, and every checkpoint found after the
kill must load. ``--tp`` lets the ranks share every product, ``--rank-local`` lets each read its own
weights only, ``--replicas`` lets both have all weights and each a part of the optimizer's state.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.backends.cluster import drill_worker
from tests.backends.cluster.drill_worker import MICROBATCHES, SAVE_STEPS, STEPS, Kill, Setup
from tests.tiny_models import TINY
from tests.train.kill_drill import DrillError

PLACES = ("forward", "backward", "optimizer", "checkpoint")
PROCESSES = 2
RESTARTS = 2
ALONE = Setup()


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        result: What the worker wrote.
        saves: What every rank's saves did.
        seconds: Of the whole run.
    """

    result: dict[str, Any]
    saves: list[list[dict[str, Any]]]
    seconds: float


def run(
    kill: Kill | None,
    folder: Path,
    *,
    setup: Setup = ALONE,
    torchrun: bool = False,
    **options: Any,
) -> Outcome:
    """Train with restarts in ``folder``.

    Args:
        kill: Where a rank is killed in the first attempt.
        folder: For output and logs.
        setup: How the processes share the model.
        torchrun: Use the command; else its agent, in this process, which starts faster.
        **options: Of ``TrainingArguments``.
    """
    start = time.monotonic()
    arguments = {"folder": str(folder), "kill": drill_worker.as_json(kill), "options": options}
    arguments["setup"] = asdict(setup)
    (_torchrun if torchrun else _agent)(folder / "logs", arguments)
    return Outcome(
        json.loads((folder / "result.json").read_text()),
        [json.loads((folder / f"saves-{r}.json").read_text()) for r in range(PROCESSES)],
        time.monotonic() - start,
    )


def points(reference: Outcome, count: int, seed: int, places: tuple[str, ...]) -> list[Kill]:
    """Return ``count`` random points for every place; the same for the same seed."""
    draw = random.Random(seed)
    found = []
    for place in places:
        for index in range(count):
            rank, step = draw.randrange(PROCESSES), draw.randrange(STEPS)
            if place in ("forward", "backward"):
                module = draw.choice(reference.result["modules"][rank])
                found.append(Kill(place, rank, step, draw.randrange(MICROBATCHES), module))
            elif place == "optimizer":
                found.append(Kill(place, rank, step, draw.randrange(2)))
            else:
                save = draw.choice(reference.saves[rank])
                call = draw.randrange(save.get("changes", 1))
                # Every other one by time: what safetensors writes is no event of Python's.
                seconds = draw.random() * save["seconds"] if index % 2 else -1.0
                found.append(Kill(place, rank, save["step"], call, "", seconds))
    return found


def problems(outcome: Outcome, reference: Outcome, kill: Kill) -> list[str]:
    """Return what is not as it must be.

    Raises:
        DrillError: Nothing was killed.
    """
    result, expected = outcome.result, reference.result
    found = []
    if result["attempt"] == 0:
        raise DrillError(f"the kill did not happen: {described(kill)}")
    if result["attempt"] != 1:
        found.append(f"restarted {result['attempt']} times")
    found += [
        f"another {name}"
        for name in ("loss", "history", "weights")
        if result[name] != expected[name]
    ]
    done = [int(n.rpartition("-")[2]) for n, s in result["found"].items() if s == "loads"]
    complete = kill.step // SAVE_STEPS * SAVE_STEPS - (kill.place == "checkpoint") * SAVE_STEPS
    if max(done, default=0) < complete:
        found.append(f"checkpoint-{complete} is lost")
    found += [
        f"{name} {state}"
        for name, state in result["found"].items()
        if state.startswith("unreadable") or (state == "passed over" and name.startswith("check"))
    ]
    return found


def drill(
    count: int,
    seed: int,
    folder: Path,
    *,
    places: tuple[str, ...] = PLACES,
    torchrun_every: int = 0,
    **options: Any,
) -> int:
    """Run all points, print a line for each; return the number of those that failed.

    Raises:
        DrillError: A kill did not happen, so that its point says nothing.
    """
    (folder / "whole").mkdir()
    reference = run(None, folder / "whole", **options)
    loss = reference.result["loss"]
    print(f"uninterrupted: loss {loss:.6f}, {reference.seconds:.1f} s", flush=True)
    failed = 0
    for number, kill in enumerate(points(reference, count, seed, places)):
        place = folder / str(number)
        place.mkdir()
        torchrun = bool(torchrun_every) and number % torchrun_every == 0
        try:
            outcome = run(kill, place, torchrun=torchrun, **options)
        except (ChildFailedError, subprocess.CalledProcessError) as error:
            failed += 1
            print(f"{kill}: {error}", flush=True)
            continue
        wrong = problems(outcome, reference, kill)
        failed += bool(wrong)
        print(
            f"{described(kill)}{' by torchrun' if torchrun else ''}: "
            f"from {outcome.result['resumed'] or 'the start'}, loss "
            f"{outcome.result['loss']:.6f}, {outcome.seconds:.1f} s: {'; '.join(wrong) or 'same'}",
            flush=True,
        )
    print(f"{failed} of {count * len(places)} points failed", flush=True)
    return failed


def described(kill: Kill) -> str:
    """Return a point in a few words."""
    where = f"rank {kill.rank} in step {kill.step}, {kill.place}"
    if kill.module:
        return f"{where} of {kill.module}, microbatch {kill.call}"
    if kill.place == "optimizer":
        return f"{where}, {'after' if kill.call else 'before'} it"
    at = f"change {kill.call}" if kill.seconds < 0 else f"after {1000 * kill.seconds:.1f} ms"
    return f"{where}, {at}"


def _agent(logs: Path, arguments: dict[str, Any]) -> None:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    multiprocessing.get_context("forkserver").set_forkserver_preload([drill_worker.__name__])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=PROCESSES,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="drill",
        max_restarts=RESTARTS,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    elastic_launch(config, drill_worker.work)(*arguments.values())


def _torchrun(logs: Path, arguments: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(PROCESSES), "--max-restarts", str(RESTARTS)]
    command += ["--log-dir", str(logs), "--redirects", "3", "-m", drill_worker.__name__]
    subprocess.run([*command, json.dumps(arguments)], check=True, capture_output=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=10, help="per place")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--torchrun-every", type=int, default=0, help="use the command itself")
    parser.add_argument("--async-save", action="store_true")
    shared = parser.add_mutually_exclusive_group()
    shared.add_argument("--tp", action="store_true", help="the ranks share every product")
    shared.add_argument("--replicas", action="store_true", help="divide the optimizer's state")
    parser.add_argument("--rank-local", action="store_true", help="each reads its own weights")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(tp=1 + given.tp, replicas=1 + given.replicas)
        if given.rank_local:
            setup = replace(setup, weights=f"{folder}/weights")
            model, _ = TINY[setup.model].build(seed=0)
            model.save_pretrained(setup.weights)
        failed = drill(
            given.points,
            given.seed,
            Path(folder),
            places=tuple(given.places),
            torchrun_every=given.torchrun_every,
            setup=setup,
            async_save=given.async_save,
        )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
