"""Refuse at the start, on every rank, what would otherwise hang or train something else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ipu_pipeline.backends.cluster.groups import Groups, everyones
from ipu_pipeline.capture import model_identity
from ipu_pipeline.errors import LoweringError, PipelineError, StageError
from ipu_pipeline.ir.plan import Plan, library_versions
from ipu_pipeline.stages.executable import ExecutionOptions

# Elements of a parameter that are compared between ranks.
SAMPLE = 256


def description(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None,
    options: ExecutionOptions,
) -> dict[str, str]:
    """Return what has to be equal on all ranks, readable, by what it is called in a message."""
    settings = {key: value for key, value in asdict(options).items() if key != "ipu_config"}
    return {
        "plan": plan.digest(),
        "model": model_identity(model).fingerprint,
        "weights of the model": _checksum(model),
        "optimizer": type(optimizer).__name__,
        **{f"option {name}": repr(value) for name, value in settings.items()},
        **{f"version of {name}": version for name, version in library_versions().items()},
    }


def agree(own: Mapping[str, str], problem: str = "") -> None:
    """Compare ``own`` with the other ranks'. Every process must call this.

    Args:
        own: From :func:`description`.
        problem: Why this rank cannot start; all ranks then refuse.

    Raises:
        LoweringError: Something differs, or some rank has a problem; the same on every rank.
    """
    found = everyones((problem, dict(own)))
    problems = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(found) if text]
    if problems:
        raise LoweringError(f"not all ranks can start: {'; '.join(problems[:3])}")
    lines = []
    for name in found[0][1]:
        values = [theirs.get(name, "missing") for _, theirs in found]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            lines.append(f"{name}: rank 0 {values[0]}, rank {other} {values[other]}")
    if lines:
        raise LoweringError(
            f"the ranks do not run the same thing ({'; '.join(lines[:4])}); give all of them the "
            "same plan, model, seed and libraries"
        )


# The type of a rank's error and its text; what other ranks can raise.
Problem = tuple[type[Exception], str] | None


def problem_of(error: Exception | None) -> Problem:
    """Return what the other ranks are told."""
    return None if error is None else (type(error), str(error))


def raise_together(groups: Groups, error: Exception | None) -> None:
    """Raise ``error`` here and its like on all ranks, if any rank has one.

    Nothing is broken then: the ranks may go on.

    Raises:
        Exception: Of the type that the first failing rank has.
    """
    raise_alike(groups.everyones(problem_of(error)), error)


def raise_alike(found: Sequence[Problem], error: Exception | None) -> None:
    """Raise what :func:`raise_together` does.

    Args:
        found: All ranks' problems.
        error: This rank's own.

    Raises:
        Exception: Of the type that the first failing rank has.
    """
    problems = [(rank, *problem) for rank, problem in enumerate(found) if problem is not None]
    if not problems:
        return
    raised: Any = error
    if raised is None:
        failed, kind, text = problems[0]
        known = issubclass(kind, PipelineError | OSError)
        raised = (kind if known else StageError)(f"rank {failed}: {text}")
    raised.raised_on_all_ranks = True
    raise raised


def _checksum(model: nn.Module) -> str:
    """Digest names, shapes and a sample of every parameter: its cost does not grow with sizes.

    The sample is spread evenly and holds both ends. What differs elsewhere only goes unnoticed;
    other seeds, other checkpoints and training steps change everything.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        if parameter.is_meta or not parameter.numel():
            continue
        flat = parameter.detach().reshape(-1)
        count = min(SAMPLE, flat.numel())
        where = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
        sample = flat[where.to(flat.device)].cpu()
        digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()
