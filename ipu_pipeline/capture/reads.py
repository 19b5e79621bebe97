"""Nodes of values that Python and the graph share: what the glue reads, passes on, and keeps.

While a :class:`~ipu_pipeline.capture.glue_run.GlueRun` is in the :class:`Session` of a capture,
a read hands its value to the glue, which goes on with it; numbers that the glue then passes to
later calls come back as host values; and tensors that it keeps are handed over. Without one, a
read only checks that its value is the captured one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ipu_pipeline.capture.calls import name_of
from ipu_pipeline.capture.compare import same_value
from ipu_pipeline.errors import GuardError

if TYPE_CHECKING:
    from ipu_pipeline.capture.glue_run import GlueRun

_LONGEST_SHOWN = 60


class Session:
    """What the nodes of one capture share.

    Attributes:
        run: The run of the glue that is going on in this microbatch.
        live: Stages run one microbatch after another, each with a run of the glue.
        replayed: Every batch is replayed first, so that values read from inputs are known.
    """

    def __init__(self) -> None:
        self.run: GlueRun | None = None
        self.live = False
        self.replayed = False


class ValueGuard(nn.Module):
    """Repeats a value ``read``: the glue gets it, or a batch with another one is refused.

    Attributes:
        number: Which of the reads it is, in the order of the glue.
        early: It is read from inputs alone: the replay has done so before the stages run.
    """

    def __init__(
        self, read: Any, expected: Any, origin: str, session: Session | None = None, number: int = 0
    ) -> None:
        super().__init__()
        self.read = read
        self.expected = expected
        self.origin = origin
        self.enabled = True
        self.session = session or Session()
        self.number = number
        self.early = False

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Hand over or check the value.

        Raises:
            GuardError: It differs from the captured one.
        """
        if not self.enabled or (self.early and self.session.replayed):
            return
        found = self.read(*args, **kwargs)
        if self.session.run is not None:
            self.session.run.arrive(self.number, found)
        elif not same_value(found, self.expected):
            raise GuardError(
                f"{self.origin} reads a tensor in Python ({name_of(self.read)}): it was "
                f"{_short(self.expected)} when the model was captured and is {_short(found)} for "
                "this batch, so that the model might take another branch; run it with "
                "target='local', which goes on with the new value, or keep the module that reads "
                "the value inside a block"
            )

    def extra_repr(self) -> str:
        """Return what tells this read from others."""
        return name_of(self.read)


class HostValue(nn.Module):
    """Gives the graph a number that Python computed from a value that it has read."""

    def __init__(self, session: Session, name: str, recorded: Any) -> None:
        super().__init__()
        self.session = session
        self.name = name
        self.recorded = recorded

    def forward(self) -> Any:
        """Return it."""
        run = self.session.run
        return self.recorded if run is None else run.hosts[self.name]


class KeptTensor(nn.Module):
    """Hands over a tensor that the glue keeps."""

    def __init__(self, session: Session, key: int) -> None:
        super().__init__()
        self.session = session
        self.key = key

    def forward(self, tensor: Tensor) -> None:
        """Hand it over."""
        if self.session.run is not None:
            self.session.run.deliver(self.key, tensor)


@contextlib.contextmanager
def unguarded(module: nn.Module) -> Iterator[None]:
    """Switch the guards in ``module`` off: it runs on tensors that have no meaningful values."""
    guards = [child for child in module.modules() if isinstance(child, ValueGuard)]
    for guard in guards:
        guard.enabled = False
    try:
        yield
    finally:
        for guard in guards:
            guard.enabled = True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
