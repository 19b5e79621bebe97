"""What was found out about one model class, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ipu_pipeline.errors import DatasetError
from ipu_pipeline.ir.codec import from_json

Result = Literal[
    "pass",
    "eager-fails",
    "nondeterministic",
    "capture-refused",
    "plan-refused",
    "emit-refused",
    "program-refused",
    "step-fails",
    "differs",
    "timeout",
    "crash",
]
# Nothing of this library ran, or there is nothing to compare with: not counted.
NOT_COUNTED: tuple[Result, ...] = ("eager-fails", "nondeterministic")
MEANING: Mapping[Result, str] = {
    "pass": "captured, planned and trained one step for every number of stages; equal to eager",
    "eager-fails": "no training step of the model alone ran on a small config (not counted)",
    "nondeterministic": "two eager steps differ, so there is nothing to compare with (not counted)",
    "capture-refused": "the capture refuses the model, and says why",
    "plan-refused": "no split was found",
    "emit-refused": "a plan for IPUs was made, and emit refuses it",
    "program-refused": "the runtime of IPUs refuses a line of the model by name, with the remedy",
    "step-fails": "the pipelined step raised an error",
    "differs": "loss, a gradient, a weight or a buffer is not that of eager training",
    "timeout": "it took longer than the time limit",
    "crash": "its process died",
}


@dataclass(frozen=True)
class Record:
    """One line of the table.

    Attributes:
        name: Model class.
        architecture: ``model_type`` under which transformers lists it.
        task: Task under which transformers lists it.
        result: One of :data:`MEANING`.
        reason: One line; empty for most passes.
        blocks: Blocks of the capture.
        stages: Stages of the plans that were run.
        difference: Largest difference of a gradient from eager, as a part of its scale.
        inputs: Names of the batch.
        seconds: Wall time of all of it.
    """

    name: str
    architecture: str
    task: str
    result: Result
    reason: str = ""
    blocks: int = 0
    stages: tuple[int, ...] = ()
    difference: float = 0.0
    inputs: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def counted(self) -> bool:
        """Whether an eager step runs and is deterministic."""
        return self.result not in NOT_COUNTED

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Read what :meth:`to_json` wrote.

        Raises:
            DatasetError: It is something else.
        """
        return from_json(cls, data, "a record of a class", DatasetError)


def one_line(error: BaseException, longest: int = 200) -> str:
    """Return kind and message of an error in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= longest else text[: longest - 3] + "..."
