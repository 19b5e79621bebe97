"""The passes of a vocabulary that is spread over processes, beside the schedule of torch.

Two kinds of processes ask the others for what they do with their rows: the one of the loss for a
softmax, and those that look up in a table. Every process with rows has a thread for each that asks,
which does what it is asked for, in that order, while the schedule goes on. What is added to the
gradient of the rows is added up at the end of a run, in one order. A process with rows that asks
itself does so in its own thread, but for the gradient behind a softmax, which nobody waits for.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.ranks.waiting import Waiter
from ipu_pipeline.backends.cluster.row_server import (
    PART_FIELDS,
    OwnRows,
    RowAsker,
    RowChannel,
    RowMessage,
    RowServer,
    described_query,
)
from ipu_pipeline.backends.cluster.row_slices import RowPlan, RowSlices
from ipu_pipeline.capture.programs import Program
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ops.autocast import autocast_dtype
from ipu_pipeline.planner.schedules.rows import MOST_KEPT
from ipu_pipeline.stages.tables import TableCalls
from ipu_pipeline.stages.vocabulary import (
    SoftmaxPart,
    SpreadLoss,
)


class _Later:
    """Runs calls in one thread, in order."""

    def __init__(self, failed: Callable[[Exception], object]) -> None:
        self._failed = failed
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def run(self, job: Callable[[], object]) -> None:
        """Run it behind those before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="vocabulary", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def wait(self) -> None:
        """Wait until all have run."""
        self._jobs.join()

    def close(self) -> None:
        """Stop the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:
                self._failed(error)
            self._jobs.task_done()
        self._jobs.task_done()


# Processes that end without waiting for each other do so within this time.
CLOSE_S = 10.0


class SpreadVocabulary:
    """What this process does for a vocabulary that is spread.

    Args:
        model: With the rows of this process.
        plan: Who has which.
        slices: Those of this process.
        groups: Every process makes this at the same time.
        failed: Called with the error of a thread.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: RowPlan,
        slices: RowSlices,
        groups: Groups,
        failed: Callable[[Exception], object],
    ) -> None:
        here = groups.layout.position
        named = dict(model.named_parameters(remove_duplicate=False))
        self._plan, self._slices, self._waiter = plan, slices, groups.waiter
        self._names = {id(p): name for name, p in reversed(named.items())}
        self._servers: list[RowServer] = []
        self._lookups: RowAsker | None = None
        self._softmax: RowAsker | None = None
        self._rows: list[OwnRows] = []
        self._later = _Later(failed)
        self._waiting: deque[tuple[int, SpreadLoss]] = deque()
        self._asked: dict[int, SpreadLoss] = {}
        self._answers: deque[int] = deque()  # microbatches whose parts the others send, in order
        self._found: dict[int, dict[int, Sequence[SoftmaxPart]]] = {}
        for number, source in enumerate((plan.last, *plan.looking_up)):
            group = groups.another_pipeline()
            rows = OwnRows(slices, named[plan.head], named) if here in plan.rows else None
            if rows is not None:
                self._rows.append(rows)
            if here == source:
                others = [position for position in sorted(plan.rows) if position != here]
                asking = RowAsker(RowChannel(group, groups.waiter), others, rows)
                if number == 0:
                    self._softmax = asking
                else:
                    self._lookups = asking
            elif rows is not None:
                waiter = Waiter(groups.waiter.activity, groups.waiter.failed)
                self._servers.append(RowServer(rows, RowChannel(group, waiter), source, failed))

    # ---- the loss ---------------------------------------------------------------------------

    def ask(self, chunk: int, loss: SpreadLoss) -> None:
        """Ask for the softmax of a microbatch, as soon as not too many others are kept."""
        self._waiting.append((chunk, loss))
        self._ask_next()

    def parts(self, chunk: int) -> Mapping[int, Sequence[SoftmaxPart]]:
        """Return the parts of a microbatch; one that was not asked for yet is asked for now."""
        asking = self._asker()
        for number, loss in list(self._waiting):
            if number == chunk:  # a schedule whose backward passes come in another order
                self._waiting.remove((number, loss))
                self._ask(number, loss)
        while len(self._found[chunk]) < len(self._plan.rows):
            oldest = self._answers.popleft()
            for other in asking.others:
                message, tensors = asking.channel.receive(other)
                left = iter(tensors)
                given: list[list[Any]] = [
                    [next(left) if name in names else None for name in PART_FIELDS]
                    for names in message.parts
                ]
                self._found[oldest][other] = [SoftmaxPart(*values) for values in given]
        return self._found.pop(chunk)

    def give_back(self, chunk: int) -> None:
        """Give everybody what the loss of a microbatch has given back for its rows."""
        asking = self._asker()
        loss = self._asked.pop(chunk)
        for other in asking.others:
            tensors = []
            for given in loss.given_back:
                one = given.get(other)
                none = torch.empty(0)
                tensors += [none] * 3 if one is None else [one.exp_N, one.logit_N, one.total_N]
            asking.channel.send(other, RowMessage("rows", chunk=chunk), tensors)
        if asking.rows is not None:
            rows, mine = asking.rows, [given.get(self._plan.last) for given in loss.given_back]
            self._later.run(lambda: rows.add_rows(chunk, mine))
        self._ask_next()

    def _ask_next(self) -> None:
        while self._waiting and len(self._asked) < MOST_KEPT:
            self._ask(*self._waiting.popleft())

    def _ask(self, chunk: int, loss: SpreadLoss) -> None:
        asking = self._asker()
        pairs = [described_query(query, self._names) for query in loss.queries]
        message = RowMessage("softmax", queries=[query for query, _ in pairs], chunk=chunk)
        for other in asking.others:
            asking.channel.send(other, message, [tensor for _, own in pairs for tensor in own])
        self._asked[chunk], self._found[chunk] = loss, {}
        self._answers.append(chunk)
        if asking.rows is not None:
            self._later.wait()  # what it keeps is used up
            self._found[chunk][self._plan.last] = asking.rows.softmax(chunk, loss.queries)

    def _asker(self) -> RowAsker:
        assert self._softmax is not None
        return self._softmax

    # ---- lookups and evaluation -------------------------------------------------------------

    @contextmanager
    def calls(self, program: Program) -> Iterator[None]:
        """Within it, what a block reads of the tables is asked of those with their rows."""
        reads = any(map(self.is_table, program.module.parameters()))
        with _RowCalls(self) if reads else nullcontext():
            yield

    def is_table(self, tensor: object) -> bool:
        """Whether a tensor is one of the tables."""
        return id(tensor) in self._slices.tables

    def look_up(self, ids: Tensor, table: nn.Parameter, padding_idx: int | None) -> Tensor:
        """Return what ``functional.embedding`` returns.

        Raises:
            LoweringError: A stage looks up that the plan knows nothing of.
            IndexError: An id is no row.
        """
        if self._lookups is None:
            raise _other_use("is looked up in another stage than the plan says")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self._plan.size:
            raise IndexError(
                f"ids from {int(ids.min())} to {int(ids.max())} are looked up in "
                f"{self._names[id(table)]!r}, which has {self._plan.size} rows"
            )
        padding = None if padding_idx is None else padding_idx % self._plan.size
        flag = torch.zeros((), requires_grad=table.requires_grad)
        found: Tensor = _LookUp.apply(flag, self, ids.reshape(-1), table, padding)
        return found.view(*ids.shape, found.shape[-1])

    def project(self, x: Tensor, table: nn.Parameter, bias: Tensor | None) -> Tensor:
        """Return what ``functional.linear`` returns, in evaluation.

        Raises:
            LoweringError: Gradients are wanted, or another stage than the last one projects.
        """
        asking = self._softmax
        if asking is None or torch.is_grad_enabled() or self._names[id(table)] != self._plan.head:
            raise _other_use("is multiplied with elsewhere than before the loss")
        narrow = autocast_dtype(x.device)
        wide = x if narrow is None else x.to(narrow)
        flat = wide.reshape(-1, x.shape[-1])
        for other in asking.others:
            asking.channel.send(other, RowMessage("project"), [flat])
        parts = {}
        if asking.rows is not None:
            parts[self._plan.last] = asking.rows.project(flat)
        for other in asking.others:
            parts[other] = asking.channel.receive(other)[1][0]
        order = sorted(parts, key=lambda position: self._plan.rows[position])
        logits = torch.cat([parts[position] for position in order], dim=1)
        logits = logits if bias is None else logits + bias.to(logits.dtype)
        return logits.view(*x.shape[:-1], self._plan.size)

    def rows_of_ids(self, ids: Tensor, table: nn.Parameter) -> Tensor:
        """Ask those with rows for the rows of ``ids``."""
        asking = self._lookups
        assert asking is not None
        chosen = self._chosen(ids)
        name = self._names[id(table)]
        for other in asking.others:
            tokens, numbers = chosen[other]
            if len(tokens):
                asking.channel.send(other, RowMessage("look up", table=name), [numbers])
        found = torch.empty(len(ids), table.shape[1], dtype=table.dtype)
        for position, (tokens, numbers) in chosen.items():
            if position in asking.others and len(tokens):
                found[tokens] = asking.channel.receive(position)[1][0]
            elif len(tokens):
                assert asking.rows is not None
                found[tokens] = asking.rows.look_up(table, numbers)
        return found

    def looked_up(
        self, ids: Tensor, table: nn.Parameter, gradient: Tensor, padding: int | None
    ) -> None:
        """Give those with rows the gradient of what was looked up."""
        asking = self._lookups
        assert asking is not None
        for position, (tokens, numbers) in self._chosen(ids, padding).items():
            if not len(tokens):
                continue
            own = gradient[tokens]
            if position in asking.others:
                message = RowMessage("looked up", table=self._names[id(table)])
                asking.channel.send(position, message, [numbers, own])
            else:
                assert asking.rows is not None
                asking.rows.looked_up(table, numbers, own)

    def _chosen(self, ids: Tensor, padding: int | None = None) -> dict[int, tuple[Tensor, Tensor]]:
        """Return by position which of ``ids`` are its rows, and their numbers there."""
        found = {}
        for position, (first, end) in sorted(self._plan.rows.items()):
            here = (ids >= first) & (ids < end)
            if padding is not None:
                here &= ids != padding
            tokens = here.nonzero().flatten()
            found[position] = tokens, ids[tokens] - first
        return found

    # ---- runs -------------------------------------------------------------------------------

    def finish(self) -> None:
        """End a run: every process has got all it was asked for; add the gradients of the rows."""
        for asking in (self._softmax, self._lookups):
            if asking is not None:
                asking.end("end")
        for server in self._servers:
            server.wait(self._waiter)
        self._later.wait()
        for rows in self._rows:
            rows.add_to_parameters()
        for table in self._slices.tables.values() if self._rows else ():
            if table.requires_grad and table.grad is None:  # none of its rows was looked up
                table.grad = torch.zeros_like(table)

    def clear(self) -> None:
        """Forget a run that has failed."""
        for left in (self._waiting, self._asked, self._answers, self._found):
            left.clear()
        for rows in self._rows:
            rows.clear()

    def close(self, *, wait: bool) -> None:
        """Stop the threads; ``wait``: none has failed, and all processes do so about now."""
        self._later.close()
        with suppress(RuntimeError):  # another one is gone, who needs nothing any more
            for asking in (self._softmax, self._lookups) if wait else ():
                if asking is not None:
                    asking.end("close")
        for server in self._servers:
            server.join(CLOSE_S if wait else 0.0)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        _flag: Tensor,
        vocabulary: SpreadVocabulary,
        ids: Tensor,
        table: nn.Parameter,
        padding: int | None,
    ) -> Tensor:
        ctx.given = vocabulary, ids, table, padding
        return vocabulary.rows_of_ids(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        vocabulary, ids, table, padding = ctx.given
        vocabulary.looked_up(ids, table, gradient, padding)
        return None, None, None, None, None


# What may be asked of a table of which only rows are here.
_ALIKE = frozenset(
    {
        torch.result_type,
        *(getattr(Tensor, n).__get__ for n in ("dtype", "device", "requires_grad", "is_meta")),
    }
)


class _RowCalls(TableCalls):
    """While active, lookups and products of the tables ask those with their rows."""

    def __init__(self, vocabulary: SpreadVocabulary) -> None:
        super().__init__()
        self._vocabulary = vocabulary

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        known = func is functional.embedding or func is functional.linear or func in _ALIKE
        given = (*args, *(kwargs or {}).values())
        if not known and any(map(self._vocabulary.is_table, given)):
            raise _other_use(f"is used by {getattr(func, '__name__', func)}")
        return super().__torch_function__(func, types, args, kwargs)

    def on_call(self, func: Any, weight: Any, args: Any, kwargs: Any) -> Any:
        """Take the calls that read a table."""
        if not self._vocabulary.is_table(weight):
            return func(*args, **kwargs)
        return (self._embedding if func is functional.embedding else self._linear)(*args, **kwargs)

    def _embedding(  # the parameters of functional.embedding
        self,
        input: Tensor,
        weight: nn.Parameter,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002
        sparse: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        del norm_type
        if max_norm is not None or scale_grad_by_freq or sparse:
            raise _other_use("is looked up with max_norm, scale_grad_by_freq or sparse gradients")
        return self._vocabulary.look_up(input, weight, padding_idx)

    def _linear(self, input: Tensor, weight: nn.Parameter, bias: Tensor | None = None) -> Tensor:
        return self._vocabulary.project(input, weight, bias)


def _other_use(what: str) -> LoweringError:
    return LoweringError(
        f"a table of the vocabulary that is spread over processes {what}; each has some of its "
        "rows, for lookups (functional.embedding) and for the projection before a cross entropy: "
        "plan without vocabulary"
    )
