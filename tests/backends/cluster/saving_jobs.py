"""What the processes of the tests of checkpoints do; results are plain data."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ipu_pipeline as ipp
from ipu_pipeline.backends.cluster import checkpoints
from ipu_pipeline.backends.cluster.ranks import watchdog
from ipu_pipeline.errors import PipelineError, StageError
from ipu_pipeline.train import TrainingArguments, build_optimizer, train
from ipu_pipeline.train import checkpoints as training_checkpoints
from tests.backends.cluster.jobs import built, compiled
from tests.tiny_models import TINY
from tests.train.eager_executable import Questions, tiny_bert


def trained(planned: dict[str, Any], path: str = "", load: str = "", steps: int = 3) -> Any:
    """Load if asked, train, save, train on; gpt2 is tied over the first and the last stage."""
    made, batch = compiled("gpt2-lm", planned={"dropout": True, **planned})
    with made:
        if load:
            made.load_checkpoint(load)
        before = [made.train_step(batch).loss for _ in range(steps)]
        if path:
            made.save_checkpoint(path, {"epoch": 1})
        return before + [made.train_step(batch).loss for _ in range(steps if path else 0)]


def from_meta(
    planned: dict[str, Any], weights: str | None = None, path: str = "", load: str = ""
) -> dict[str, Any]:
    """Train gpt2 from meta, with what a rank holds and what it refuses."""
    _, plan, batch = built("gpt2-lm", dropout=True, **planned)
    model, _ = TINY["gpt2-lm"].build(dropout=True, device="meta")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    refused = []

    def refuses(call: Any) -> None:
        with pytest.raises(PipelineError) as caught:
            call()
        refused.append(str(caught.value))

    with ipp.compile(
        model,
        plan,
        target="distributed",
        optimizer=optimizer,
        weights=weights,
        loss_weights="samples",
    ) as made:
        if load:
            made.load_checkpoint(load)
        else:
            refuses(lambda: made.save_checkpoint(f"{path}-too-early"))
        losses = [made.train_step(batch).loss for _ in range(3)]
        refuses(made.state_dict)
        if path:
            made.save_checkpoint(path)
            losses += [made.train_step(batch).loss for _ in range(3)]
        held = sum(p.untyped_storage().nbytes() for p in model.parameters())
        return {"losses": losses, "held": held, "refused": refused}


def files(path: str) -> dict[str, str]:
    """Return the checksums of the files with tensors."""
    described = json.loads((Path(path) / "checkpoint.json").read_text())["files"]
    return {n: f["sha256"] for n, f in described.items() if n.endswith(".safetensors")}


def saved_twice(folder: str, planned: dict[str, Any]) -> dict[str, Any]:
    """Save in both ways; the one in the background is held up until training went on."""
    made, batch = compiled("gpt2-lm", planned=planned)
    go_on = threading.Event()
    with made, replaced("write_shard", lambda *args: go_on.wait(60) and write(*args)):
        made.train_step(batch)
        made.save_checkpoint(f"{folder}/later", {"n": 1}, blocking=False)
        first = made.train_step(batch).loss
        hidden = not Path(f"{folder}/later").exists()
        go_on.set()
        made.wait_for_checkpoint()
        complete = Path(f"{folder}/later").exists()
    made, batch = compiled("gpt2-lm", planned=planned)
    with made:
        made.train_step(batch)
        made.save_checkpoint(f"{folder}/now", {"n": 1})
        second = made.train_step(batch).loss
    return {"hidden": hidden, "complete": complete, "losses": (first, second)}


write = checkpoints.write_shard


@contextmanager
def replaced(name: str, value: Any) -> Any:
    earlier = getattr(checkpoints, name)
    setattr(checkpoints, name, value)
    try:
        yield
    finally:
        setattr(checkpoints, name, earlier)


@contextmanager
def full_disk(rank: int, limit: int = 1000) -> Any:
    """The kernel lets one rank write no more than ``limit`` bytes into a file."""
    if dist.get_rank() != rank:
        yield
        return
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def failing_saves(folder: str, planned: dict[str, Any], rank: int, blocking: bool) -> Any:
    """One rank's disk is full during the second save; return errors, then try again."""
    made, batch = compiled("gpt2-lm", planned=planned)
    errors = []
    with made:
        made.train_step(batch)
        made.save_checkpoint(f"{folder}/first")
        with full_disk(rank):
            try:
                made.save_checkpoint(f"{folder}/second", blocking=blocking)
                made.train_step(batch)
                made._checkpoints._background._thread.join()
                errors.append("")
            except OSError as error:
                errors.append(str(error))
        try:
            made.save_checkpoint(f"{folder}/third")
        except OSError as error:
            errors.append(str(error))
        dist.barrier()  # the first rank has removed what it began
        left = sorted(item.name for item in Path(folder).iterdir())
        made.train_step(batch)
        made.save_checkpoint(f"{folder}/third", blocking=False)
    return {"errors": errors, "left": left}


def error_at_the_end(folder: str, planned: dict[str, Any], how: str) -> str:
    """The last save fails in the background; return what leaving the block raises."""
    made, batch = compiled("gpt2-lm", planned=planned)
    try:
        with made:
            made.train_step(batch)
            with full_disk(1):
                made.save_checkpoint(f"{folder}/first", blocking=False)
                made._checkpoints._background._thread.join()
            if how == "wait":
                made.wait_for_checkpoint()
            if how == "load":
                made.load_checkpoint(f"{folder}/first")
            if how == "own error":
                raise KeyError("mine")
    except (OSError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def killed(folder: str, planned: dict[str, Any], where: str) -> str:
    """A process dies during the second save; return what the others say."""
    watchdog.SILENT_S, watchdog.REASON_S = 4.0, 8.0
    made, batch = compiled("gpt2-lm", planned=planned)
    made.train_step(batch)
    made.save_checkpoint(f"{folder}/first")
    rank = 0 if where == "finish" else 1

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == rank:
        checkpoints.write_shard = write if where == "finish" else die
        checkpoints.CheckpointWriter.finish = die  # type: ignore[method-assign,assignment]
    made.train_step(batch)
    try:
        made.save_checkpoint(f"{folder}/second", blocking=where != "background")
        made.wait_for_checkpoint()
        return "saved"
    except StageError as error:
        made.close()
        return str(error)


def without_shared_disk(folder: str, planned: dict[str, Any]) -> Any:
    """The last rank does not see what the first writes; then both do."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    checkpoints.logger.addHandler(handler)
    made, batch = compiled("gpt2-lm", planned=planned)
    last = dist.get_rank() == dist.get_world_size() - 1
    with replaced("SEEN_S", 0.0), made:
        made.train_step(batch)
        made.save_checkpoint(f"{folder}/shared")
        see = checkpoints._appears
        with replaced("_appears", lambda path: not last and see(path)):
            made.save_checkpoint(f"{folder}/alone")
            made.save_checkpoint(f"{folder}/again", blocking=False)
    checkpoints.logger.removeHandler(handler)
    return lines


class Stopped(Exception):
    """Training is interrupted."""


class Counting(Questions):
    """Counts the samples that are read."""

    num_read = 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.num_read += 1
        return super().__getitem__(index)


def loop(
    folder: str,
    stop_at: int = 0,
    target: str = "distributed",
    num_samples: int = 24,
    **changes: Any,
) -> Any:
    """Train with checkpoints; ranks but the first look for them in the wrong place.

    Returns the losses, their mean, and how many samples this process has read.
    """
    data = Counting(num_samples)
    arguments = TrainingArguments(
        output_dir=folder,
        disable_tqdm=True,
        **{
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-3,
            "logging_steps": 4,
            "save_steps": 2,
            "save_total_limit": 2,
            "resume_from_checkpoint": "auto",
        }
        | changes,
    )
    model = tiny_bert()
    example = {k: torch.tensor([v, v]) for k, v in Questions(1)[0].items()}
    replicas = arguments.replicas
    stages, microbatches = 2 // replicas, arguments.gradient_accumulation_steps
    plan = ipp.plan(model, example, num_stages=stages, microbatches=microbatches)
    plan = replace(plan, replicas=replicas)
    made = ipp.compile(
        model,
        plan,
        target=target,
        optimizer=build_optimizer(model, arguments),
        max_grad_norm=arguments.max_grad_norm,
        self_check=False,
        batches=arguments.batches,
    )
    blind = target == "distributed" and dist.get_rank() > 0
    find = training_checkpoints.find_resume_checkpoint
    training_checkpoints.find_resume_checkpoint = (lambda _: None) if blind else find

    def stop(state: Any, _: Any) -> None:
        if state.global_step == stop_at:
            raise Stopped

    try:
        with made:
            result = train(made, data, arguments, on_step=stop)
    except Stopped:
        return None
    finally:
        training_checkpoints.find_resume_checkpoint = find
    logs = [log["loss"] for log in result.log_history if "loss" in log]
    return logs, result.training_loss, data.num_read
