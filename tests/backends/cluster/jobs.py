"""What the processes of a test do; results are plain data."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.backends.cluster import executable  # noqa: F401 - preloaded
from ipu_pipeline.backends.cluster.executable import DistributedExecutable
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ops import linear
from ipu_pipeline.ops.adamw import StochasticRoundingAdamW
from tests.backends.cluster.processes import PLANS
from tests.tiny_models import TINY

MICROBATCHES = 4
# Gradients below this part of the largest one are rounding (a key's bias has none in theory).
NOISE = 1e-9
torch.set_num_threads(1)


def built(
    name: str,
    *,
    num_stages: int,
    replicas: int = 1,
    dropout: bool = False,
    dtype: torch.dtype | None = None,
    tp: int = 1,
    **planned: Any,
) -> tuple[nn.Module, Plan, dict[str, Tensor]]:
    """Return a model, its plan, and a batch for all replicas."""
    model, example = TINY[name].build(dropout=dropout)
    model.to(dtype)
    planned = {"microbatches": MICROBATCHES, "num_stages": num_stages, **planned}
    size = 2 * planned["microbatches"] * replicas
    batch = TINY[name].batch(batch_size=size, seed=3)
    with planned_once((name, dropout, dtype, *sorted(planned.items()))) as path:
        if not path.exists():
            ipp.plan(model, example, **planned).save(path)
    plan = replace(Plan.load(path), replicas=replicas)
    if tp > 1:
        plan = replace(plan, machine=machine_by_name("h100-x8"), settings={"tp": tp})
    return model, plan, batch


@contextmanager
def planned_once(key: tuple[Any, ...]) -> Iterator[Path]:
    """Give the file of a plan, to one process at a time: the first one makes it for all."""
    path = Path(os.environ[PLANS]) / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.json"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def compiled(
    name: str,
    *,
    target: str = "distributed",
    planned: dict[str, Any],
    learning_rate: float | None = 1e-3,
    optimizer_class: Any = torch.optim.AdamW,
    num_trained: int | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Tensor]]:
    # How losses weigh is measured at the first step, which takes long: test_batches.py asks that.
    options = {"loss_weights": "samples", "self_check": False, **options}
    model, plan, batch = built(name, **planned)
    optimizer = None
    if learning_rate is not None:
        optimizer = optimizer_class(list(model.parameters())[:num_trained], lr=learning_rate)
    made = ipp.compile(model, plan, target=target, optimizer=optimizer, **options)
    return made, batch


class StochasticAdamW(StochasticRoundingAdamW):
    """Ours, over parameters in an order in which the tied table has several positions."""

    def __init__(self, parameters: list[Any], lr: float) -> None:
        super().__init__(parameters[::-1], lr=lr, seed=3)


def gradients(name: str, planned: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Compare this rank's gradients with those of plain accumulation of the microbatches' means.

    ``error`` is over the largest gradient of the model, ``own_error`` over that of each parameter.
    """
    made, batch = compiled(name, planned=planned, learning_rate=None, **options)
    with made:
        loss = made.forward_backward(batch)
        named = [(n, p) for n, p in made.model.named_parameters() if p.grad is not None]
        found = {n: made._slices.whole(p, p.grad).clone() for n, p in named}
    made.model.zero_grad()
    parts = len(next(iter(batch.values()))) // 2
    expected_loss = 0.0
    for index in range(parts):
        part = {key: value[2 * index : 2 * index + 2] for key, value in batch.items()}
        own = made.model(**part).loss
        (own / parts).backward()
        expected_loss += own.item() / parts
    expected = {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}
    largest = {n: gradient.abs().max().item() for n, gradient in expected.items()}
    scale = max(largest.values())
    differences = {n: (found[n] - expected[n]).abs().max().item() for n in found}
    return {
        "loss": loss,
        "expected_loss": expected_loss,
        "expected": set(expected),
        "found": set(found),
        "error": max(differences.values()) / scale,
        "own_error": max(d / max(largest[n], NOISE * scale) for n, d in differences.items()),
    }


def casts_kept(name: str, planned: dict[str, Any], **options: Any) -> tuple[int, int]:
    """Return how many weights a bfloat16 step has cast, and how many casts are left after it."""
    made: list[Tensor] = []

    def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
        made.append(weight)
        return plain(weight, dtype)

    plain = linear._cast
    trained, batch = compiled(name, planned=planned, precision="bf16", **options)
    with (
        trained,
        mock.patch.object(linear, "_LEAST_MULTIPLICATIONS", 0),
        mock.patch.object(linear, "_cast", cast),
    ):
        trained.forward_backward(batch)
    return len(made), len(linear._casts)


def gradients_or_refusal(name: str, **arguments: Any) -> dict[str, Any]:
    """Like :func:`gradients`; the text of the refusal where it is refused before it runs."""
    try:
        return gradients(name, **arguments)
    except ipp.errors.StageError:
        raise
    except ipp.errors.PipelineError as error:
        return {"refused": str(error)}


def curve(name: str, planned: dict[str, Any], steps: int, **options: Any) -> dict[str, Any]:
    """Train; return losses, norms, and what the weights are afterwards."""
    made, batch = compiled(name, planned={"dropout": True, **planned}, **options)
    with made:
        results = [made.train_step(batch) for _ in range(steps)]
        own = {n: digest(p) for n, p in made.model.named_parameters() if held(made, p)}
        return {
            "losses": [result.loss for result in results],
            "norms": [result.grad_norm for result in results],
            "skipped": [result.skipped for result in results],
            "own": own,
            "state": {n: digest(t) for n, t in made.state_dict().items()},
            "sum": sum(t.double().sum().item() for t in made.state_dict().values()),
            "moments": num_moments(made),
        }


def _infinite(gradient: Tensor) -> Tensor:
    return gradient * float("inf")


def overflow_on_the_last_rank(planned: dict[str, Any]) -> dict[str, Any]:
    """Let one gradient of one rank be infinite in the second of three steps."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    made, batch = compiled("bert-qa", planned=planned, loss_scaling=scaler)
    factors, skipped = [], []
    with made:
        for step in range(3):
            if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
                own = next(p for p in made.model.parameters() if held(made, p))
                hook = own.register_hook(_infinite)
            skipped.append(made.train_step(batch).skipped)
            factors.append(made._scaler.factor)
            if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
                hook.remove()
    return {"factors": factors, "skipped": skipped}


def num_moments(made: Any) -> int:
    """Count the elements of the optimizer state that this process keeps, step counters aside."""
    states = made.optimizer.state.values()
    return sum(v.numel() for s in states for v in s.values() if isinstance(v, Tensor) and v.ndim)


def two_sums(name: str, planned: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Add the gradients of a step to those of a call before it, and update once."""
    made, batch = compiled(name, planned=planned, **options)
    with made:
        made.train_step(batch)
        made.forward_backward(batch)
        held = {n: digest(p.grad) for n, p in made.model.named_parameters() if p.grad is not None}
        made.train_step(batch)
        left = [n for n, p in made.model.named_parameters() if p.grad is not None]
        state = {n: digest(t) for n, t in made.state_dict().items()}
    return {"gradients": held, "left": left, "state": state}


def held(made: DistributedExecutable, parameter: nn.Parameter) -> bool:
    assert made._passes.ownership is not None
    return made._passes.ownership.is_held(parameter)


def digest(tensor: Tensor) -> str:
    whole = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(whole.numpy().tobytes()).hexdigest()


def evaluation(name: str, planned: dict[str, Any], samples: int, **options: Any) -> dict[str, Any]:
    """Evaluate a batch of any size; compare with the unsplit model and the local target."""
    options = {"loss_weights": None, **options}
    made, _ = compiled(name, planned=planned, learning_rate=None, **options)
    batch = TINY[name].batch(batch_size=samples, seed=5)
    with made:
        result = made.eval_step(batch)
    made.model.eval()
    with torch.no_grad():
        expected = made.model(**batch)
    errors = {n: (v - expected[n]).abs().max().item() for n, v in result.outputs.items()}
    with ipp.compile(made.model, made.plan, self_check=False) as local:
        expected_loss = local.eval_step(batch).loss
    return {"loss": result.loss, "expected_loss": expected_loss, "errors": errors}


def train_and_save(
    name: str, planned: dict[str, Any], path: str, load: str = "", **options: Any
) -> dict[str, Any]:
    """Load if asked, take three steps, save, take three more."""
    made, batch = compiled(name, planned={"dropout": True, **planned}, **options)
    with made:
        extra = made.load_checkpoint(load) if load else {}
        before = [made.train_step(batch).loss for _ in range(3)]
        made.save_checkpoint(path, {"epoch": 1})
        after = [made.train_step(batch).loss for _ in range(3)]
        num_states = len(made.optimizer.state)
    return {"before": before, "after": after, "extra": extra, "num_states": num_states}


def save_into_a_file(planned: dict[str, Any], path: str) -> str:
    made, batch = compiled("bert-qa", planned=planned)
    with made:
        made.train_step(batch)
        try:
            made.save_checkpoint(path)
        except OSError as error:
            return str(error)
    return "saved"


def mismatch(what: str, planned: dict[str, Any]) -> str:
    """Plan on every rank, start with something different on the last one; return the refusal."""
    odd = dist.get_rank() == dist.get_world_size() - 1
    model, example = TINY["bert-qa"].build()
    plan = ipp.plan(model, example, microbatches=MICROBATCHES, **planned)
    options: dict[str, Any] = {}
    if what == "plan" and odd:
        model, plan, _ = built("bert-qa", **{**planned, "microbatches": 2 * MICROBATCHES})
    if what == "weights" and odd:
        torch.nn.init.ones_(next(model.parameters()))
    if what == "option" and odd:
        options["seed"] = 7
    if what == "problem" and odd:
        options["recompute"] = ["nothing"]
    try:
        ipp.compile(model, plan, target="distributed", self_check=False, **options)
    except ipp.errors.LoweringError as error:
        return str(error)
    return "started"


def _last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def misuse(planned: dict[str, Any]) -> list[str]:
    """Return what is said to calls that cannot be answered."""
    made, batch = compiled("bert-qa", planned=planned, learning_rate=None)
    found = []
    empty = {name: value[:0] for name, value in batch.items()}
    calls = [(made.train_step, batch), (made.forward_backward, empty), (made.eval_step, batch)]
    for index, (call, argument) in enumerate(calls):
        if index == 2:
            made.close()
            made.close()
        try:
            call(argument)
        except ipp.errors.LoweringError as error:
            found.append(str(error))
    return found


def leaving(planned: dict[str, Any]) -> str:
    """The caller's own code fails on the last rank after one step."""
    made, batch = compiled("bert-qa", planned=planned)
    try:
        with made:
            for _ in range(3):
                made.train_step(batch)
                if _last():
                    raise KeyError("mine")
    except ipp.errors.StageError as error:
        return str(error)
    except KeyError:
        return "left"
    return "trained"
