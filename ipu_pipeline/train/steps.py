"""What differs between the targets of ``PipelineTrainer``: how it steps, predicts and fetches."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from ipu_pipeline.stages.executable import Executable

if TYPE_CHECKING:
    from ipu_pipeline.train.trainer import PipelineTrainer

Prediction = tuple[Tensor | None, Any, Any]


class TargetSteps(ABC):
    """The steps of one trainer on one target; they hold the executable.

    Args:
        trainer: The ``PipelineTrainer``.

    Attributes:
        executable: Of the present model, once something was run.
        reads_ahead: Whether several evaluation batches may be predicted together.
        has_gradients: Whether they are in the model after a step, for the loop to clip.
    """

    target: ClassVar[str]
    reads_ahead = True
    has_gradients = True

    def __init__(self, trainer: PipelineTrainer) -> None:
        self._trainer = trainer
        self.executable: Executable | None = None

    # ---- training -----------------------------------------------------------------------

    def check_training(self) -> None:  # noqa: B027 - nothing to refuse by default
        """Refuse to train what the target does not compute.

        Raises:
            ValueError: It was asked for.
        """

    @abstractmethod
    def begin(self) -> None:
        """Begin an optimizer step; nothing is left of an abandoned one."""

    @abstractmethod
    def microbatch(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> Tensor:
        """Take a microbatch of an optimizer step; at the last one, all of them have run.

        Args:
            model: The model.
            inputs: What it is called with.
            num_items: As transformers counts them; ``None`` where the loss does not ask.

        Returns:
            The weighted losses of those that have run, 0 if none has.
        """

    def train_sampler(self, sampler: Sampler[int] | None) -> Sampler[int] | None:
        """Return the sampler of the training data, perhaps another one."""
        return sampler

    # ---- evaluation ---------------------------------------------------------------------

    @abstractmethod
    def predict(self, bodies: Sequence[Callable[[], Prediction]]) -> list[Prediction]:
        """Run code that predicts a batch each; its calls of the model run in the stages."""

    # ---- the run ------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Surround the training, an evaluation or a prediction."""
        yield

    def watch_callbacks(self) -> None:  # noqa: B027 - nothing to do where weights are here
        """Fetch weights before callbacks that may read them."""

    def fetch(self, *, optimizer: bool = False) -> None:  # noqa: B027 - they are here
        """Bring the weights here up to date, and the optimizer's state if asked."""

    def has_executable(self) -> bool:
        """Whether there is one of the present model."""
        return self.executable is not None and self.executable.model is self._trainer.model

    def close(self) -> None:
        """Free what runs the model; the next step compiles it anew."""
        made, self.executable = self.executable, None
        if made is not None:
            made.close()


class CollectedSteps(TargetSteps):
    """Steps of a target that runs all microbatches of an optimizer step in one call."""

    def __init__(self, trainer: PipelineTrainer) -> None:
        super().__init__(trainer)
        self._waiting: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Begin an optimizer step; nothing is left of an abandoned one."""
        self._waiting.clear()

    def microbatch(
        self,
        model: nn.Module,  # noqa: ARG002 - of targets that run compute_loss
        inputs: dict[str, Any],
        num_items: Tensor | int | None,
    ) -> Tensor:
        """Take a microbatch; the last one of an optimizer step runs them all."""
        trainer = self._trainer
        self._waiting.append(dict(inputs))
        if len(self._waiting) < trainer.current_gradient_accumulation_steps:
            return torch.zeros((), device=trainer.args.device)
        parts, self._waiting = self._waiting, []
        loss = self.step(parts, num_items)
        trainer._finite.add(trainer.state.global_step, loss)
        return torch.tensor(loss, device=trainer.args.device)

    @abstractmethod
    def step(self, parts: Sequence[Mapping[str, Any]], num_items: Any) -> float:
        """Run all microbatches of an optimizer step; return the loss of the step.

        Args:
            parts: Inputs of each.
            num_items: As transformers counts them; ``None`` where the loss does not ask.
        """
