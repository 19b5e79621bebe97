"""Consistency checks: refuse on every rank what would otherwise hang or train something else.

At the start all ranks compare plan, model, options and versions. In every step each rank compares
its batch with that of the rank before: messages have the shapes that each derives from its own
batch, and gloo ends the process, hangs, or takes a message that is too short without a word. That
comparison is one small message per rank, sent before the step's first activations and checked
where they are waited for, so it is no step of its own for all ranks together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler

from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.layout import torch_schedule
from ipu_pipeline.backends.cluster.ranks.rendezvous import StoreGather
from ipu_pipeline.capture import model_identity
from ipu_pipeline.errors import GuardError, LoweringError, PipelineError, StageError
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan, library_versions
from ipu_pipeline.stages.batch import Microbatch, batch_text
from ipu_pipeline.stages.block_runs import recomputed_blocks
from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.stages.stage import Stage
from ipu_pipeline.stages.tables import check_blocks

# Elements of a tensor that are compared between ranks.
SAMPLE = 256
NOTE_BYTES = 256
_DIGEST_BYTES = 8
# Of a rank: its error, by kind and text, and what it returns.
_Report = tuple[tuple[str, str] | None, Any]
T = TypeVar("T")


# ---- errors that all ranks raise --------------------------------------------------------


class AllGather(Protocol):
    """What all ranks tell each other through."""

    def gather(self, value: Any, kind: Any = Any) -> list[Any]:
        """Return the values of all ranks."""


def together(ranks: AllGather, function: Callable[[], T], who: str = "rank") -> list[T]:
    """Return what ``function`` returns on every rank; raise on all what it raises on any.

    All ranks call this, and may go on after an error. That of another rank is of the type that the
    first failing rank has, which is called ``who`` and its number.
    """
    error: Any = None
    value = None
    try:
        value = function()
    except Exception as problem:
        error = problem
    found = ranks.gather((None if error is None else (_kind_of(error), str(error)), value), _Report)
    failed = next((rank for rank, (problem, _) in enumerate(found) if problem), None)
    if failed is None:
        return [value for _, value in found]
    if error is None:
        kind, text = found[failed][0]
        error = _kinds().get(kind, StageError)(f"{who} {failed}: {text}")
    error.raised_on_all_ranks = True
    raise error


def _kinds() -> dict[str, type[Exception]]:
    """Return the errors that all ranks raise as one of them does, by name."""
    kinds: list[type[Exception]] = [OSError, ValueError, PipelineError]
    for kind in kinds:
        kinds += kind.__subclasses__() if issubclass(kind, PipelineError) else []
    return {kind.__name__: kind for kind in kinds}


def _kind_of(error: Exception) -> str:
    """Return the name of the first class of an error that all ranks know."""
    known = _kinds()
    return next((k.__name__ for k in type(error).__mro__ if known.get(k.__name__) is k), "")


# ---- the start --------------------------------------------------------------------------


def check(plan: Plan, options: ExecutionOptions) -> None:
    """Refuse what the target cannot run whatever the number of processes.

    Raises:
        LoweringError: An unknown schedule, unknown blocks, or the sequential mode.
    """
    torch_schedule(options.schedule or plan.schedule)
    recomputed_blocks(options.recompute, plan)
    check_blocks(plan)
    options.refuse_ipus("distributed")
    if options.sequential:
        raise LoweringError(
            "sequential runs all stages in one thread, the distributed target in several "
            "processes; use the local target for the sequential reference"
        )


def refuse_sparse_gradients(model: nn.Module) -> None:
    """Refuse embeddings with sparse gradients, which are not summed over processes.

    Raises:
        LoweringError: The model has one.
    """
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise LoweringError(
                f"the gradient of {fqn or type(module).__name__!r} is sparse (sparse=True), and "
                "the distributed target sums dense gradients only; set its sparse to False"
            )


def description(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None,
    options: ExecutionOptions,
) -> dict[str, str]:
    """Return what has to be equal on all ranks, readable, by what it is called in a message."""
    settings = {key: value for key, value in asdict(options).items() if key != "ipu_config"}
    if options.device is not None:  # each rank has its own of a type
        settings["device"] = torch.device(options.device).type
    return {
        # What is decided, not what a rank that plans by itself has measured.
        "plan": f"{plan.digest().partition('-')[2]} ({plan.schedule}, {plan.num_microbatches} "
        f"microbatches of {plan.micro_batch_size}, {count_of(plan.replicas, 'replica')})",
        "model": model_identity(model).fingerprint,
        "weights of the model": _checksum(model),
        "optimizer": type(optimizer).__name__,
        **{f"option {name}": _readable(value) for name, value in settings.items()},
        **{f"version of {name}": version for name, version in library_versions().items()},
    }


def _readable(value: Any) -> str:
    if isinstance(value, GradScaler):
        return repr(value.state_dict())
    return str(getattr(value, "__qualname__", repr(value)))


def check_alike(own: Mapping[str, str], problem: str, ranks: StoreGather) -> None:
    """Compare ``own`` with the other ranks'. Every process must call this.

    Args:
        own: From :func:`description`.
        problem: Why this rank cannot start, if it cannot; all ranks then refuse.
        ranks: All processes.

    Raises:
        LoweringError: Something differs, or some rank has a problem; the same on every rank.
    """
    found = ranks.gather((problem, dict(own)), tuple[str, dict[str, str]])
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


def _checksum(model: nn.Module) -> str:
    """Digest names, shapes and a sample of every parameter: its cost does not grow with sizes.

    The sample is spread evenly and holds both ends. What differs elsewhere only goes unnoticed;
    other seeds, other checkpoints and training steps change everything.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        digest.update(_sample(parameter))
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    """Return some of the values of a tensor."""
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = tensor.detach().reshape(-1)
    count = min(SAMPLE, flat.numel())
    where = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
    return flat[where.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes()


# ---- every batch ------------------------------------------------------------------------


class BatchCheck:
    """Compares what the ranks are called for, and with which batch.

    Args:
        groups: Of the processes.
        apart: Replicas have batches of their own, which are not compared.
    """

    def __init__(self, groups: Groups, *, apart: bool = False) -> None:
        self._groups = groups
        layout = groups.layout
        self._size = layout.num_ranks * layout.tp if apart else dist.get_world_size()
        self._sent: tuple[dist.Work, Tensor] | None = None

    def check(self, call: str, step: int, *parts: Mapping[str, Any]) -> None:
        """Compare this call, and the batch or its microbatches, with those of the rank before.

        Of large tensors a sample of the values is compared. Every process calls this, before
        anything in its batch can be refused.

        Raises:
            ValueError: They differ.
        """
        head = f"for {call} in step {step}"
        self._compare(
            f"{head} with {'; '.join(map(batch_text, parts))}",
            "give every rank the same whole batch (each takes its own part), or with "
            "batches='share' every rank of a replica the same share, in the same order",
            head,
            b"".join(_sample(v) for part in parts for v in part.values() if isinstance(v, Tensor)),
        )

    def check_glue(
        self,
        step: int,
        parts: Sequence[Microbatch],
        prepared: Sequence[Microbatch],
        stages: Sequence[Sequence[Stage]],
    ) -> None:
        """Compare what the model's code did for every microbatch: its numbers, and what is sent.

        What it read of values that stages compute is compared, too: a later capture reads what this
        process makes of them with its own weights, new for its own stages only. Every process calls
        this.

        Raises:
            ValueError: They differ.
            GuardError: So does what it read.
        """
        given = [
            [_short(value) for name, value in after.inputs.items() if name not in before.inputs]
            for before, after in zip(parts, prepared, strict=True)
        ]
        read = [[_short(value) for value in own[0].late_values] for own in stages]
        if any(read):
            found = f"{given} after reading {read} in Python"
            remedy = (
                "it may take another branch, as a process has the newest weights of its own stages "
                "only: run it with target='local', or keep the module that reads inside a block"
            )
        else:
            found = f"{given}"
            remedy = (
                "let the code between the model's blocks do the same on every rank: the same seeds "
                "for random and numpy, no clock, and what blocks or their hooks fill, of which a "
                "rank runs its own only, emptied at the start of forward"
            )
        self._compare(
            f"with {found} by the model's own code in step {step}",
            remedy,
            values=repr([[(s.receives, s.sends) for s in own] for own in stages]).encode(),
            error=GuardError if any(read) else ValueError,
        )

    def _compare(
        self,
        text: str,
        remedy: str,
        head: str = "",
        values: bytes = b"",
        error: type[Exception] = ValueError,
    ) -> None:
        """Compare a text and values, with another replica's rank its head only."""
        rank, size = dist.get_rank(), dist.get_world_size()
        notes = {True: _note(text, values), False: _note(head)}
        if rank + 1 < size:
            if self._sent is not None:
                self._groups.waiter.run(self._sent[0].wait)
            sent = notes[(rank + 1) % self._size != 0].to(self._groups.device)
            work = dist.isend(sent, dst=rank + 1, group=self._groups.world)
            assert work is not None
            self._sent = (work, sent)
        if rank == 0:
            return
        own = notes[rank % self._size != 0].to(self._groups.device)
        theirs = torch.empty_like(own)
        receiving = dist.irecv(theirs, src=rank - 1, group=self._groups.world)
        assert receiving is not None
        self._groups.waiter.run(receiving.wait)
        if not torch.equal(theirs, own):
            other = "with other values" if _text(theirs) == _text(own) else _text(theirs)
            raise error(f"rank {rank} was called {text}, but rank {rank - 1} {other}; {remedy}")


def _short(value: Any) -> Any:
    """Return what is compared of a value: of an array what it holds."""
    if not isinstance(value, np.ndarray):
        return value
    return value.shape, hashlib.blake2b(value.tobytes(), digest_size=8).hexdigest()


def _note(text: str, values: bytes = b"") -> Tensor:
    """Return a digest of both, and as much of ``text`` as fits, shape ``(NOTE_BYTES,)``."""
    data = text.encode()
    digest = hashlib.blake2b(data + values, digest_size=_DIGEST_BYTES).digest()
    whole = (digest + data)[:NOTE_BYTES].ljust(NOTE_BYTES, b"\0")
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8)


def _text(note: Tensor) -> str:
    data = bytes(note.cpu().numpy()[_DIGEST_BYTES:])
    return data.rstrip(b"\0").decode(errors="replace")
