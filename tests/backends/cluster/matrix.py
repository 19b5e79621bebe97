"""Every architecture on 2 and 4 processes: the tables of issue 7.

    python -m tests.backends.cluster.matrix [gradients|training] [--processes 2 4] [--only TEXT]

``gradients``: under every schedule, the largest difference between any gradient and that of the
unsplit model over the largest gradient of the model, or the number of a refusal whose text is
printed below. ``training``: with dropout, the largest relative difference of 50 losses from those
of the local target; how many tied tensors have the same bits on all their holders after 100 steps;
and the largest relative difference of 20 losses of 2 stages x 2 replicas from those of one
process at the same total batch.

The exit code is 1 where a cell is wrong. The tests run a part of these tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from ipu_pipeline.backends.cluster.layout import torch_schedule, torch_schedules
from tests.backends.cluster import jobs
from tests.backends.cluster.processes import Processes
from tests.tiny_models import TINY

SCHEDULES = tuple(kind.name for kind in torch_schedules())
TOLERANCE = 1e-6
# Of one parameter's gradients, relative to the largest of them: far below one lost microbatch.
OWN_TOLERANCE = 1e-3
CURVE_TOLERANCE = 2e-5
CURVE_STEPS, TIED_STEPS, REPLICA_STEPS = 50, 100, 20
ANSWER_S = 300.0


def case(schedule: str, processes: int) -> dict[str, Any]:
    """Return the arguments of the job ``gradients`` for a schedule on so many processes.

    Schedules with several stages per process get two, of half layers where layers are too few,
    and a microbatch for each of them.
    """
    num_stages = processes * torch_schedule(schedule).stages_per_device[0]
    planned = {
        "num_stages": num_stages,
        "microbatches": max(jobs.MICROBATCHES, num_stages),
        "granularity": "layer" if num_stages <= 4 else "sublayer",
    }
    return {"planned": planned, "schedule": schedule}


def problem(found: Sequence[dict[str, Any]]) -> str:
    """Return what is wrong with the gradients of all ranks; empty: nothing, or all refuse alike."""
    refusals = [rank.get("refused", "") for rank in found]
    if any(refusals):
        return "" if len(set(refusals)) == 1 else f"ranks refuse differently: {refusals}"
    if any(abs(rank["loss"] / rank["expected_loss"] - 1) > TOLERANCE for rank in found):
        return f"losses {[rank['loss'] for rank in found]}, expected {found[0]['expected_loss']}"
    names = set().union(*(rank["found"] for rank in found))
    if names != found[0]["expected"]:
        return f"gradients of {sorted(names ^ found[0]['expected'])} on no rank, or not expected"
    if any(rank["found"] == names for rank in found):
        return "a rank has gradients of the whole model"
    worst = max(rank["error"] for rank in found)
    own = max(rank["own_error"] for rank in found)
    if worst > TOLERANCE or own > OWN_TOLERANCE:
        return f"error {worst:.1e} of the largest gradient, {own:.1e} of the parameter's own"
    return ""


def difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference of two curves."""
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


def local_losses(name: str, planned: dict[str, Any], steps: int) -> list[float]:
    """Return the losses of the local target."""
    made, batch = jobs.compiled(name, target="local", planned={"dropout": True, **planned})
    with made:
        return [made.train_step(batch).loss for _ in range(steps)]


def tied(found: Sequence[dict[str, Any]]) -> tuple[int, list[str]]:
    """Return how many tensors several ranks hold, and which of them have different bits."""
    bits: dict[str, list[str]] = {}
    for rank in found:
        for name, digest in rank["own"].items():
            bits.setdefault(name, []).append(digest)
    shared = {name: digests for name, digests in bits.items() if len(digests) > 1}
    return len(shared), [name for name, digests in shared.items() if len(set(digests)) > 1]


class Tables:
    """Runs cells and prints them."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.problems: list[str] = []

    def gradients(self, processes: int, names: Sequence[str]) -> None:
        """Print every schedule on so many processes."""
        print(f"\ngradients, {processes} processes\n| model | {' | '.join(SCHEDULES)} |")
        print("|" + "---|" * (len(SCHEDULES) + 1))
        for name in names:
            running = Processes(processes, answer_s=ANSWER_S)
            cells = [self._gradients(running, name, schedule) for schedule in SCHEDULES]
            running.close()
            print(f"| {name} | {' | '.join(cells)} |", flush=True)

    def training(self, processes: int, names: Sequence[str]) -> None:
        """Print curves, tied weights and, on 4 processes, replicas."""
        tests: dict[str, Callable[[Processes, str], str]] = {
            f"{CURVE_STEPS} losses, tied weights after {TIED_STEPS}": self._curve
        }
        if processes == 4:
            tests[f"2 stages x 2 replicas, {REPLICA_STEPS} losses"] = self._replicas
        print(f"\ntraining, {processes} processes\n| model | {' | '.join(tests)} |")
        print("|" + "---|" * (len(tests) + 1))
        for name in names:
            running = Processes(processes, answer_s=ANSWER_S)
            cells = [test(running, name) for test in tests.values()]
            running.close()
            print(f"| {name} | {' | '.join(cells)} |", flush=True)

    def _gradients(self, running: Processes, name: str, schedule: str) -> str:
        arguments = case(schedule, running.world_size)
        answers = running.answers("gradients_or_refusal", name=name, **arguments)
        failed = [text for good, text in answers if not good]
        found = [value for good, value in answers if good]
        wrong = failed[0] if failed else problem(found)
        if wrong:
            return self._wrong(f"{name}, {schedule}, {len(answers)} processes: {wrong}")
        refused = found[0].get("refused")
        if refused is None:
            return f"{max(rank['error'] for rank in found):.0e}"
        if refused not in self.refusals:
            self.refusals.append(refused)
        return f"refused [{self.refusals.index(refused) + 1}]"

    def _curve(self, running: Processes, name: str) -> str:
        planned = {"num_stages": running.world_size}
        found = running.run("curve", name=name, planned=planned, steps=TIED_STEPS)
        worst = difference(
            found[0]["losses"][:CURVE_STEPS], local_losses(name, planned, CURVE_STEPS)
        )
        count, different = tied(found)
        if (
            worst > CURVE_TOLERANCE
            or different
            or any(r["state"] != found[0]["state"] for r in found)
        ):
            return self._wrong(f"{name}, {planned}: losses differ by {worst:.1e}; {different}")
        return f"{worst:.0e}, {count} tied"

    def _replicas(self, running: Processes, name: str) -> str:
        planned = {"num_stages": 2, "replicas": 2}
        found = running.run("curve", name=name, planned=planned, steps=REPLICA_STEPS)
        one = {"num_stages": 1, "microbatches": 2 * jobs.MICROBATCHES}
        worst = difference(found[0]["losses"], local_losses(name, one, REPLICA_STEPS))
        if worst > CURVE_TOLERANCE or tied(found)[1]:
            return self._wrong(f"{name}, {planned}: losses differ by {worst:.1e}; {tied(found)[1]}")
        return f"{worst:.0e}"

    def _wrong(self, text: str) -> str:
        self.problems.append(text)
        return "WRONG"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.backends.cluster.matrix")
    parser.add_argument("what", nargs="?", choices=("gradients", "training"))
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", default="", help="models whose name holds this")
    arguments = parser.parse_args(argv)
    tables = Tables()
    names = [name for name in TINY if arguments.only in name]
    for what in ("gradients", "training") if arguments.what is None else (arguments.what,):
        for processes in arguments.processes:
            getattr(tables, what)(processes, names)
    for number, text in enumerate(tables.refusals, 1):
        print(f"[{number}] {text}")
    for text in tables.problems:
        print(f"WRONG: {text}")
    return int(bool(tables.problems))


if __name__ == "__main__":
    raise SystemExit(main())
