"""What a process does with its rows of a spread vocabulary, for those that ask.

Messages are plain data (msgpack) and the tensors that they describe; nothing is pickled.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from ipu_pipeline.backends.cluster.ranks.waiting import POLL_S, GivenUp, Waiter
from ipu_pipeline.backends.cluster.row_slices import RowSlices
from ipu_pipeline.ops.linear_cross_entropy import Elementwise
from ipu_pipeline.stages.serialize import add_gradient
from ipu_pipeline.stages.vocabulary import (
    KeptSoftmax,
    SoftmaxGradients,
    SoftmaxPart,
    SoftmaxQuery,
    softmax_part,
)

PART_FIELDS = tuple(SoftmaxPart.__dataclass_fields__)


class RowQuery(msgspec.Struct):
    """A :class:`SoftmaxQuery`, but for its tensors."""

    bias: str
    steps: list[tuple[Literal["cast", "add", "mul", "tanh"], float | str | None]]
    sums_all: bool
    needs_x: bool


class RowMessage(msgspec.Struct):
    """What a message is, and the tensors behind it: shape and dtype of each."""

    what: Literal["look up", "looked up", "softmax", "rows", "project", "end", "close", "answer"]
    tensors: list[tuple[list[int], str]] = []
    table: str = ""
    queries: list[RowQuery] = []
    parts: list[list[str]] = []
    chunk: int = -1


class RowChannel:
    """Messages between this process and others of one group, from and to one thread."""

    def __init__(self, group: dist.ProcessGroup, waiter: Waiter) -> None:
        self._group = group
        self.waiter = waiter
        self._sent: deque[tuple[Any, Tensor]] = deque()

    def send(self, to: int, message: RowMessage, tensors: Sequence[Tensor] = ()) -> None:
        """Begin to send; the tensors may not be changed before :meth:`flush`."""
        wires = [tensor.detach().contiguous() for tensor in tensors]
        message.tensors = [(list(w.shape), str(w.dtype).removeprefix("torch.")) for w in wires]
        body = torch.frombuffer(bytearray(msgspec.msgpack.encode(message)), dtype=torch.uint8)
        for wire in (torch.tensor([len(body)]), body, *wires):
            if wire.numel():
                work = dist.isend(wire, group=self._group, group_dst=to)
                self._sent.append((work, wire))
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()

    def receive(self, source: int) -> tuple[RowMessage, list[Tensor]]:
        """Wait for a message."""
        length = int(self._received(torch.empty(1, dtype=torch.int64), source))
        body = self._received(torch.empty(length, dtype=torch.uint8), source)
        message = msgspec.msgpack.decode(body.numpy().tobytes(), type=RowMessage)
        tensors = [
            self._received(torch.empty(shape, dtype=getattr(torch, dtype)), source)
            for shape, dtype in message.tensors
        ]
        return message, tensors

    def flush(self) -> None:
        """Wait until all messages are sent."""
        while self._sent:
            self.waiter.run(self._sent.popleft()[0].wait)

    def _received(self, tensor: Tensor, source: int) -> Tensor:
        if tensor.numel():
            work = dist.irecv(tensor, group=self._group, group_src=source)
            assert work is not None
            self.waiter.run(work.wait)
        return tensor


class OwnRows:
    """The rows of this process, for one process that asks: what it computes, and their gradient."""

    def __init__(
        self, slices: RowSlices, head: nn.Parameter, named: dict[str, nn.Parameter]
    ) -> None:
        self._slices, self._head, self._named = slices, head, named
        self._kept: dict[int, list[KeptSoftmax]] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._looked_up: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def answer(self, asked: RowMessage, tensors: list[Tensor]) -> tuple[RowMessage, list[Tensor]]:
        """Do what a message asks for, and return what to answer; ``end``: nothing."""
        done = RowMessage("end"), list[Tensor]()
        if asked.what == "look up":
            return RowMessage("answer"), [self.look_up(self._named[asked.table], tensors[0])]
        if asked.what == "looked up":
            self.looked_up(self._named[asked.table], tensors[0], tensors[1])
            return done
        if asked.what == "project":
            return RowMessage("answer"), [self.project(tensors[0])]
        if asked.what == "softmax":
            parts = self.softmax(asked.chunk, _queries_of(asked, tensors, self._named))
            names = [[n for n in PART_FIELDS if getattr(part, n) is not None] for part in parts]
            found = [getattr(p, n) for p, own in zip(parts, names, strict=True) for n in own]
            return RowMessage("answer", parts=names), found
        triples = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
        given = [SoftmaxGradients(*own) if own[0].numel() else None for own in triples]
        self.add_rows(asked.chunk, given)
        return done

    def look_up(self, table: nn.Parameter, ids: Tensor) -> Tensor:
        """Return rows by their numbers here."""
        return self._slices.rows_of(table)[ids]

    def looked_up(self, table: nn.Parameter, ids: Tensor, gradient: Tensor) -> None:
        """Take the gradient of rows that were looked up."""
        self._looked_up.append((table, ids, gradient))

    def project(self, x: Tensor) -> Tensor:
        """Return the logits of the rows, without bias."""
        return functional.linear(x, self._slices.rows_of(self._head).to(x.dtype))

    def softmax(self, chunk: int, queries: Sequence[SoftmaxQuery]) -> list[SoftmaxPart]:
        """Compute the parts of a microbatch's softmax."""
        assert self._slices.rows is not None
        first, end = self._slices.rows
        pairs = []
        for query in queries:
            bias = None if query.bias_V is None else query.bias_V.detach()[first:end]
            pairs.append(softmax_part(query, self._slices.rows_of(self._head), bias, first))
        self._kept[chunk] = [kept for _, kept in pairs]
        return [part for part, _ in pairs]

    def add_rows(self, chunk: int, given: Sequence[SoftmaxGradients | None]) -> None:
        """Add the gradient of the rows behind a microbatch's softmax."""
        assert self._slices.rows is not None
        first, end = self._slices.rows
        for one, own in zip(self._kept.pop(chunk), given, strict=True):
            if own is not None:
                bias = one.query.bias_V
                of_bias = None if bias is None else self._sum_of(bias, len(bias))
                rows_of_bias = None if of_bias is None else of_bias[first:end]
                one.add_gradients(own, self._sum_of(self._head, end - first), rows_of_bias)

    def add_to_parameters(self) -> None:
        """Add all sums to ``.grad``, those of lookups behind the others."""
        for parameter, gradient in self._sums.items():
            add_gradient(parameter, gradient)
        for table, ids, gradient in self._looked_up:
            if table.grad is None:
                table.grad = torch.zeros_like(table)
            table.grad.index_add_(0, ids, gradient.to(table.dtype))
        self.clear()

    def clear(self) -> None:
        """Forget the last run."""
        self._sums.clear()
        self._looked_up.clear()
        self._kept.clear()

    def _sum_of(self, parameter: nn.Parameter, length: int) -> Tensor | None:
        if not parameter.requires_grad:
            return None
        if parameter not in self._sums:
            shape = (length, *parameter.shape[1:])
            self._sums[parameter] = parameter.new_zeros(shape, requires_grad=False)
        return self._sums[parameter]


def described_query(query: SoftmaxQuery, names: dict[int, str]) -> tuple[RowQuery, list[Tensor]]:
    """Return what a query is, and its tensors."""
    steps: list[tuple[Any, Any]] = []
    tensors = [query.x_NH, query.target_N]
    for step in query.pointwise:
        if step.kind == "add":
            tensors.append(step.operand)
        operand = step.operand if step.kind == "mul" else None
        name = str(step.operand).removeprefix("torch.") if step.kind == "cast" else operand
        steps.append((step.kind, name))
    if query.summed_V is not None:
        tensors.append(query.summed_V)
    bias = "" if query.bias_V is None else names[id(query.bias_V)]
    return RowQuery(bias, steps, query.summed_V is not None, query.needs_x), tensors


def _queries_of(
    message: RowMessage, tensors: list[Tensor], named: dict[str, nn.Parameter]
) -> list[SoftmaxQuery]:
    found, left = [], iter(tensors)
    for each in message.queries:
        x_NH, target_N = next(left), next(left)
        steps = []
        for kind, operand in each.steps:
            value: Any = next(left) if kind == "add" else operand
            steps.append(Elementwise(kind, getattr(torch, value) if kind == "cast" else value))
        summed_V = next(left) if each.sums_all else None
        bias = named[each.bias] if each.bias else None
        found.append(SoftmaxQuery(x_NH, bias, tuple(steps), target_N, summed_V, each.needs_x))
    return found


class RowServer:
    """Does with the rows here what one process asks for, in a thread of its own."""

    def __init__(
        self, rows: OwnRows, channel: RowChannel, source: int, failed: Callable[[Exception], object]
    ) -> None:
        self.rows = rows
        self._channel, self._source, self._failed = channel, source, failed
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="vocabulary", daemon=True)
        self._thread.start()

    def wait(self, waiter: Waiter) -> None:
        """Wait until the run has ended for the process that asks."""
        with waiter.activity.waits():
            while not self._ended.wait(POLL_S):
                waiter.give_up_after_failure()
        self._ended.clear()

    def join(self, timeout_s: float) -> None:
        """Wait until the process that asks has closed, or is known to have failed."""
        self._thread.join(timeout=max(timeout_s, 5 * POLL_S))
        self._channel.waiter.close()

    def _serve(self) -> None:
        try:
            while (message := self._channel.receive(self._source))[0].what != "close":
                if message[0].what == "end":
                    self._channel.flush()
                    self._ended.set()
                    continue
                answer = self.rows.answer(*message)
                if answer[0].what != "end":
                    self._channel.send(self._source, *answer)
        except GivenUp:
            pass
        except Exception as error:
            self._failed(error)


class RowAsker:
    """This process asks those with rows, itself as well."""

    def __init__(self, channel: RowChannel, others: Sequence[int], rows: OwnRows | None) -> None:
        self.channel = channel
        self.others = tuple(others)
        self.rows = rows

    def end(self, what: Literal["end", "close"]) -> None:
        """Tell the others that a run has ended, or all of them."""
        for other in self.others:
            self.channel.send(other, RowMessage(what))
        self.channel.flush()
