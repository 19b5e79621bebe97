"""Kill -9 of a local training at any moment; resumed, it must end as if nothing had happened.

``python -m tests.train.kill_drill --points 100`` draws 100 moments of one training with saves and
rotations: every step, and every change of the output folder. The folder holds an older run's
checkpoint of a later step, which must neither be resumed nor touched.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers.trainer  # noqa: F401 - before forking: once instead of in every training

import ipu_pipeline as ipp
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.train import TrainingArguments, build_optimizer, latest_checkpoint, train
from tests.train.eager_executable import Questions, tiny_bert

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
STEPS, SAVE_STEPS, LIMIT = 11, 2, 2
OLDER = "checkpoint-24"


class DrillError(Exception):
    """The drill itself went wrong, and says nothing about what it drills."""


def forked(work: Callable[[], Any], answer: Path) -> tuple[int, Any]:
    """Run ``work`` in a forked process; return the signal that ended it, and what it returned."""
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            answer.write_text(json.dumps(work()))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if not number and not answer.is_file():
        raise DrillError("a training of the drill has failed; see its error above")
    return number, json.loads(answer.read_text()) if not number else None


@cache
def two_stages() -> Plan:
    """Return the plan of all trainings, made once before they are forked."""
    example = {n: torch.tensor([v, v]) for n, v in Questions()[0].items()}
    return ipp.plan(tiny_bert(), example, num_stages=2, microbatches=2)


def training(output: Path, die_at: int = -1, **options: Any) -> dict[str, Any]:
    """Train in this process until event ``die_at``; return what it computed, and its events."""
    torch.set_num_threads(1)
    fresh = options.get("resume_from_checkpoint") is None or latest_checkpoint(output) is None
    model = tiny_bert(seed=0 if fresh else 99)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        save_total_limit=LIMIT,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=3,
        warmup_steps=2,
        disable_tqdm=True,
        **{"learning_rate": 1e-3, **options},
    )
    optimizer = build_optimizer(model, arguments)
    events: list[str] = []

    def event(name: str) -> None:
        if len(events) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        events.append(name)

    def changed(name: str, values: tuple[Any, ...]) -> None:
        path = values[0] if values else None
        inside = isinstance(path, str | os.PathLike) and str(path).startswith(str(output))
        if name in CHANGES and inside and events:  # the run has begun
            event(f"{name} {Path(str(path)).relative_to(output)}")

    optimizer.register_step_pre_hook(lambda *_: event("before an update"))
    optimizer.register_step_post_hook(lambda *_: event("after an update"))
    sys.addaudithook(changed)
    with ipp.compile(model, two_stages(), optimizer=optimizer, self_check=False) as made:
        result = train(made, Questions(), arguments, on_step=lambda *_: event("a step"))
        state = made.state_dict()
    return {
        "events": events,
        "loss": result.training_loss,
        "weights": {
            name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
            for name, value in state.items()
        },
        "left": sorted(path.name for path in output.iterdir()),
    }


def drill(points: int, seed: int, folder: Path, **options: Any) -> int:
    """Run ``points`` kills, print a line for each; return how many ended otherwise.

    Raises:
        DrillError: A kill did not happen.
    """
    answer, older = folder / "answer.json", folder / "older"
    two_stages()
    forked(partial(training, older, learning_rate=0.1), answer)
    latest = latest_checkpoint(older)
    assert latest is not None

    def prepared(name: str) -> Path:
        shutil.copytree(latest, folder / name / OLDER)
        return folder / name

    _, whole = forked(partial(training, prepared("whole"), **options), answer)
    draw, failed = random.Random(seed), 0
    number = len(whole["events"])
    if options.get("async_save"):  # the last ones come in another number from time to time
        number -= 20
    moments = draw.sample(range(number), min(points, number))
    print(f"{len(whole['events'])} moments; uninterrupted: loss {whole['loss']:.6f}", flush=True)
    for index, moment in enumerate(moments):
        place = prepared(str(index))
        killed, _ = forked(partial(training, place, moment, **options), answer)
        if killed != signal.SIGKILL:
            raise DrillError(
                f"the kill at moment {moment} did not happen: {whole['events'][moment]}"
            )
        found = latest_checkpoint(place)
        resumed = {**options, "resume_from_checkpoint": "auto"}
        _, again = forked(partial(training, place, **resumed), answer)
        wrong = [key for key in ("loss", "weights", "left") if again[key] != whole[key]]
        failed += bool(wrong)
        print(
            f"{whole['events'][moment]}: from {found.name if found else 'the start'}, loss "
            f"{again['loss']:.6f}: {'another ' + ', '.join(wrong) if wrong else 'same'}",
            flush=True,
        )
        shutil.rmtree(place)
    print(f"{failed} of {len(moments)} points failed", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async-save", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        failed = drill(given.points, given.seed, Path(folder), async_save=given.async_save)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
