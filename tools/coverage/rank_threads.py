"""Ranks of one pipeline as threads: each has a copy of the model, in which only its own count."""

from __future__ import annotations

import copy
import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.backends.cluster.inference import entering_stages, positions_of_weights
from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.backends.cluster.placed import RankProgram
from ipu_pipeline.ir.plan import Plan

_ANSWER_S = 30.0


class ThreadLinks:
    """Messages between the threads of one process."""

    def __init__(self, layout: Layout, mail: defaultdict[Any, queue.SimpleQueue[Tensor]]) -> None:
        self.layout = layout
        self.device = torch.device("cpu")
        self.sent_bytes = 0
        self._mail = mail

    def start_send(self, wire: Tensor, position: int) -> Callable[[], object]:
        """Put a copy into the other's mailbox."""
        self.sent_bytes += wire.nbytes
        self._mail[self.layout.position, position].put(wire.clone())
        return lambda: None

    def receive(self, wire: Tensor, position: int) -> None:
        """Take the next message of a rank."""
        wire.copy_(self._mail[position, self.layout.position].get(timeout=_ANSWER_S))


def on_threads(
    model: nn.Module, plan: Plan, call: Callable[[nn.Module], Any], num_ranks: int | None = None
) -> list[Any]:
    """Return what ``call`` of a model returns on every rank, or raise the first error of one.

    What a rank does not hold is NaN in its copy, so that it cannot be used unseen.
    """
    depth = plan.num_stages
    ranks = num_ranks or depth
    mail: defaultdict[Any, queue.SimpleQueue[Tensor]] = defaultdict(queue.SimpleQueue)
    for one in range(ranks):
        for other in range(ranks):
            mail[one, other]  # made here, in one thread
    results: list[Any] = [None] * ranks
    errors: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        layout = Layout(rank, 1, ranks, depth, tuple(s % ranks for s in range(depth)))
        try:
            with torch.no_grad():
                own = copy.deepcopy(model).eval()
                held = positions_of_weights(own, plan, layout)
                for parameter, where in held.items():
                    if not where >> rank & 1:
                        parameter.fill_(torch.nan)
                program = RankProgram(ThreadLinks(layout, mail), held)
                with entering_stages(own, plan, layout) as begun, begun(program) as whole:
                    results[rank] = whole(call(own))
        except BaseException as error:
            errors.append((isinstance(error, queue.Empty), error))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=lambda found: found[0])[1]
    return results
