"""What the processes of ``test_batches.py`` do; results are plain data."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import ipu_pipeline as ipp
from tests.backends.cluster.jobs import built
from tests.backends.local import test_batch_losses as losses
from tests.tiny_models import TINY


def made_for(
    name: str, *, target: str = "distributed", planned: dict[str, Any], **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """Return an executable with plain SGD (Adam would magnify rounding), and a full batch."""
    model, plan, batch = built(name, **planned)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = ipp.compile(model, plan, target=target, optimizer=optimizer, self_check=False, **options)
    return made, batch


def first(batch: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    return {name: value[:size] for name, value in batch.items()}


def trained(
    name: str,
    *,
    sizes: Sequence[int],
    planned: dict[str, Any],
    target: str = "distributed",
    **options: Any,
) -> dict[str, Any]:
    """Run batches of ``sizes`` for their gradients, then train on them in the same order."""
    made, batch = made_for(name, target=target, planned=planned, **options)
    found_losses, gradients = [], []
    with made, Messages() as messages:

        def share(size: int) -> dict[str, Tensor]:
            """Return what this process is given: all, or its share."""
            kept = made.share_of(size)
            part = {name: value[:size][kept] for name, value in batch.items()}
            return part if kept.stop > (kept.start or 0) else {}

        for size in sizes:
            found_losses.append(made.forward_backward(share(size)))
            parameters = dict(made.model.named_parameters())
            found = {n: p.grad for n, p in parameters.items() if p.grad is not None}
            gradients.append({n: g.numpy().copy() for n, g in found.items()})
            for parameter in parameters.values():
                parameter.grad = None
        steps = [made.train_step(share(size)) for size in sizes]
        state = {n: t.numpy().copy() for n, t in made.state_dict().items()}
        return {
            "losses": found_losses + [step.loss for step in steps],
            "norms": [step.grad_norm for step in steps],
            "samples": [step.num_samples for step in steps],
            "gradients": gradients,
            "state": state,
            "messages": messages.found,
        }


class Messages(logging.Handler):
    """Collects the warnings of the package while it is open."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())

    def __enter__(self) -> Messages:
        logging.getLogger("ipu_pipeline").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("ipu_pipeline").removeHandler(self)


def lengths(
    name: str,
    *,
    calls: Sequence[tuple[int, int]],
    planned: dict[str, Any],
    limit: int | None = None,
    target: str = "distributed",
    **options: Any,
) -> dict[str, Any]:
    """Train and evaluate on batches of (samples, length), with at most ``limit`` shapes."""
    made, _ = made_for(name, target=target, planned=planned, **options)
    passes = getattr(made, "_passes", None)
    shapes = (made._cache if passes is None else passes.cache)._shapes
    pipelines = () if passes is None else passes._pipelines
    if limit is not None:
        shapes.limit = limit
    found_losses, kept = [], []
    with made, Messages() as messages:
        for samples, seq_length in calls:
            batch = TINY[name].batch(batch_size=samples, seq_length=seq_length, seed=samples)
            found_losses += [made.train_step(batch).loss, made.eval_step(batch).loss]
            kept.append((len(shapes), len(pipelines)))
        total = sum(t.double().sum().item() for t in made.state_dict().values())
    return {"losses": found_losses, "sum": total, "kept": kept, "messages": messages.found}


def odd_batch(
    planned: dict[str, Any], odd: int, size: int, seq_length: int, call: str = "train_step"
) -> str:
    """Train; then one rank is given another batch than the others. Return what it says."""
    made, batch = made_for("bert-qa", planned=planned)
    made.train_step(batch)
    getattr(made, call)(batch)
    other = TINY["bert-qa"].batch(batch_size=size, seq_length=seq_length, seed=3)
    found = ""
    try:
        getattr(made, call)(other if dist.get_rank() == odd else batch)
    except ipp.errors.StageError as error:
        found = str(error)
    made.close()
    return found


def odd_call(planned: dict[str, Any]) -> str:
    """The last rank evaluates while the others train."""
    made, batch = made_for("bert-qa", planned=planned)
    last = dist.get_rank() == dist.get_world_size() - 1
    found = ""
    try:
        (made.eval_step if last else made.train_step)(batch)
    except ipp.errors.StageError as error:
        found = str(error)
    made.close()
    return found


def uncapturable(planned: dict[str, Any]) -> list[Any]:
    """A batch without labels; then go on."""
    made, batch = made_for("bert-qa", planned=planned)
    unlabelled = {n: v for n, v in batch.items() if not n.endswith("positions")}
    with made:
        loss = made.train_step(batch).loss
        try:
            made.train_step(unlabelled)
        except ipp.errors.CaptureError as error:
            return [loss, str(error), made.train_step(batch).loss]
    return []


torch.set_num_threads(1)


def uneven(loss: str, microbatches: int, target: str = "distributed") -> list[float]:
    """Losses of a batch with uneven labels and an input of which axis 1 holds the samples."""
    model = losses.Model(getattr(losses, loss))
    batch: dict[str, Any] = losses.uneven_batch()
    size = losses.SAMPLES // microbatches
    micro = {name: value[:size] for name, value in batch.items()}
    if loss == "with_positions":
        generator = torch.Generator().manual_seed(2)
        shape = (losses.SAMPLES, losses.SAMPLES, 3)
        batch["extra"] = torch.randn(shape, generator=generator)
        micro["extra"] = batch["extra"][:, :size]
    plan = ipp.plan(model.train(), micro, num_stages=2, microbatches=microbatches)
    with ipp.compile(model, plan, target=target) as made:
        return [made.forward_backward(batch), made.eval_step(batch).loss]


def in_shares(
    loss: Any,
    microbatches: int,
    sizes: Sequence[int] = (losses.SAMPLES,),
    unlabelled: slice = slice(0),
    *,
    cut: bool = False,
) -> list[dict[str, Any]]:
    """Compare the loss and gradients of shares with those of the whole batch, or be refused.

    ``unlabelled`` samples of the first batch have no labels; ``cut``: the caller cuts batches.
    """
    model, full = losses.Model(loss), losses.uneven_batch()
    batch = {**full, "labels": full["labels"].clone()}
    batch["labels"][unlabelled] = losses.IGNORED
    size = losses.SAMPLES // microbatches // dist.get_world_size()
    micro = {name: value[:size] for name, value in batch.items()}
    plan = ipp.plan(model.train(), micro, num_stages=1, microbatches=microbatches)
    plan = replace(plan, replicas=dist.get_world_size())
    found = []
    with ipp.compile(model, plan, target="distributed", batches="share") as made:
        for number in sizes:
            whole = {name: value[:number] for name, value in batch.items()}
            batch = full
            expected, gradients = losses.truth(model, whole)
            kept = made.share_of(number)
            share = {name: value[kept] for name, value in whole.items()}
            model.zero_grad()
            try:
                given = share if len(share["ids"]) else {}
                step = made.forward_backward_parts
                own = step([given], [1.0])[0] if cut else made.forward_backward(given)
            except ipp.errors.LoweringError as error:
                found.append({"refused": str(error)})
                continue
            pairs = ((p.grad, gradients[n]) for n, p in model.named_parameters() if n in gradients)
            close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)
            found.append({"loss": own, "expected": expected, "close": close})
    return found


def each_loss_in_shares(microbatches: int) -> dict[str, Any]:
    return {loss.__name__: in_shares(loss, microbatches)[0] for loss in losses.LOSSES}


def contrastive(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    each = logits.mean(1)
    return functional.cross_entropy(each @ each.T, torch.arange(len(each)))


def drawn(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return losses.token_mean(model, logits, labels) * random.random()


def counting(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    model.calls = getattr(model, "calls", 0) + 1  # type: ignore[assignment]
    return losses.token_mean(model, logits, labels) * model.calls


def refused_in_shares() -> list[Any]:
    """Return what is said of losses that shares do not give, and of batches that begin badly."""
    said = [in_shares(loss, 1)[0] for loss in (contrastive, drawn, counting)]
    said += [in_shares(loss, 1, cut=True)[0] for loss in (drawn, counting)]
    small, *rest = in_shares(losses.token_mean, 1, [2, 8, 5, 1])
    *others, empty = in_shares(losses.token_mean, 2, [8, 8, 0], slice(4))
    for begin in (slice(4), slice(4, 8), slice(2)):
        others += in_shares(losses.class_weights, 2, [8, 8], begin)
    return [*said, small, empty, *rest, *others]
