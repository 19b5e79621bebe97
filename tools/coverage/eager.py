"""The step that everything is compared with: the model alone, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from ipu_pipeline.capture.patches import preserved_state
from tools.coverage.classes import ModelClass
from tools.coverage.reasons import Progress, is_final, why_not_built, why_not_trained
from tools.coverage.tiny_batch import candidates
from tools.coverage.tiny_config import tiny_config
from tools.coverage.tiny_exceptions import EXCEPTIONS

MICROBATCHES = 2
Batch = Mapping[str, Any]


class EagerError(Exception):
    """The model alone does not train on any batch that was made for it."""


@dataclass(frozen=True)
class Outcome:
    """What a step computed.

    Attributes:
        loss: Mean over the microbatches.
        gradients: By name of the parameter; of those that have one.
        buffers: By name, after the step.
    """

    loss: float
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def model_and_batches(item: ModelClass) -> tuple[nn.Module, list[Batch]]:
    """Build a small model, and microbatches of equal shapes on which it trains.

    Raises:
        EagerError: It cannot be built, or trains on none of the candidates.
    """
    try:
        model = _build_model(item)
    except Exception as error:
        raise EagerError(why_not_built(item.load(), error)) from error
    return model, _find_batches(model, item.task)


def _build_model(item: ModelClass) -> nn.Module:
    """Build a small model with seeded weights in training mode."""
    kind = item.load()
    config = tiny_config(kind.config_class, fixed=EXCEPTIONS.get(item.name))
    set_seed(0)
    model: nn.Module = kind(config)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # whatever the config says
            module.p = 0.0
    return model.train()


def _find_batches(model: nn.Module, task: str) -> list[Batch]:
    """Return what the model trains on; the reason of a failure is that of what got furthest."""
    failures: list[tuple[int, BaseException]] = []
    progress = Progress()
    streams = [candidates(model, task, seed, progress, failures) for seed in range(MICROBATCHES)]
    for batches in zip(*streams, strict=False):
        try:
            with progress.counting():
                _check_outcome(eager_step(model, batches))
            return list(batches)
        except Exception as error:
            failures.append((progress.calls, error))
    if not failures:
        failures.append((0, EagerError("no batch could be made for it")))
    reason = max(failures, key=lambda failure: (is_final(failure[1]), failure[0]))[1]
    raise EagerError(why_not_trained(type(model), reason)) from reason


def _check_outcome(outcome: Outcome) -> None:
    if not outcome.gradients:
        raise EagerError("the loss does not depend on any parameter")
    if not all(map(_finite, [torch.tensor(outcome.loss), *outcome.gradients.values()])):
        raise EagerError(f"loss or gradients are not finite (loss {outcome.loss})")


def eager_step(model: nn.Module, parts: Sequence[Batch], seed: int = 0) -> Outcome:
    """Accumulate the gradients of all microbatches; the model is left as it was.

    Raises:
        EagerError: There is no scalar loss.
    """
    with preserved_state(model):
        set_seed(seed)
        losses = [_backward(model, part, len(parts)) for part in parts]
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return Outcome(sum(losses) / len(losses), gradients, buffers)


def why_not_repeatable(model: nn.Module, parts: Sequence[Batch], first: Outcome) -> str | None:
    """Say why eager training does not give the same step again; ``None`` when it does."""
    if differ(first, eager_step(model, parts)):
        return "two steps with the same seed differ"
    if differ(first, eager_step(model, parts, seed=1)):
        return "the model draws random numbers while training, whatever its config says"
    return None


def own_values(batch: Batch) -> dict[str, Any]:
    """Return a batch that a model may write to."""
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in batch.items()}


def _backward(model: nn.Module, part: Batch, count: int) -> float:
    output = model(**own_values(part))
    loss = output.get("loss")
    if not isinstance(loss, Tensor) or loss.ndim > 0 or not loss.requires_grad:
        shown = (
            "no loss" if loss is None else f"a loss of shape {tuple(getattr(loss, 'shape', ()))}"
        )
        raise EagerError(f"the model returns {shown} for {', '.join(part)}")
    (loss / count).backward()
    return float(loss)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def differ(one: Outcome, other: Outcome) -> bool:
    """Tell whether two steps differ in loss, a gradient or a buffer."""
    pairs: Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = iter(
        [(one.gradients, other.gradients), (one.buffers, other.buffers)]
    )
    same = all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs
    )
    return one.loss != other.loss or not same
