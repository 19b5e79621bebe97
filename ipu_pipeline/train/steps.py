"""What differs between the targets of ``PipelineTrainer``: how it steps, predicts and fetches."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.executable import EvalResult, Executable

if TYPE_CHECKING:
    from ipu_pipeline.train.mixin import PipelineMixin

logger = logging.get_logger(__name__)
Prediction = tuple[Tensor | None, Any, Any]
T = TypeVar("T")
_EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
# Events between a step's backward pass and its update.
_INSIDE_STEP = ("on_pre_optimizer_step", "on_optimizer_step")
_EVERY_STEP = ("on_step_begin", "on_step_end", "on_substep_end")


class TargetSteps(ABC):
    """The steps of one trainer on one target; they hold the executable.

    Args:
        trainer: The trainer.

    Attributes:
        executable: Of the present model, once something was run.
        reads_ahead: Whether several evaluation batches may be predicted together.
        has_gradients: Whether they are in the model after a step, for the loop to clip.
    """

    target: ClassVar[str]
    reads_ahead = True
    has_gradients = True

    def __init__(self, trainer: PipelineMixin) -> None:
        self._trainer = trainer
        self.executable: Executable | None = None

    # ---- what transformers sees ---------------------------------------------------------

    def enter(self) -> None:  # noqa: B027 - there is one process by default
        """Make the trainer's arguments ready, before anything is made of them."""

    def adapt(self, accelerator: Any) -> Any:
        """Return the accelerator that the trainer uses in place of its own."""
        return accelerator

    def num_stages(self, replicas: int) -> int | None:  # noqa: ARG002 - the planner chooses
        """Return how many stages to plan where nobody says; ``None``: the machine's devices."""
        return None

    def plan(self, make: partial[Plan]) -> Plan:
        """Return the plan that ``make`` makes, which has the arguments of the trainer."""
        return make()

    def agreed(self, work: Callable[[], T], *, everywhere: bool = False) -> T:  # noqa: ARG002
        """Return what ``work`` returns in the first process, to all; what it raises, all raise.

        ``everywhere``: each process does it, and all raise what it raises in any.
        """
        return work()

    def watch_callbacks(self) -> None:  # noqa: B027 - weights are here by default
        """Fetch weights before callbacks that may read them."""

    # ---- training -----------------------------------------------------------------------

    def check_code(self) -> None:  # noqa: B027 - nothing to refuse by default
        """Refuse code of the trainer's class that the target does not run.

        Raises:
            ValueError: There is some.
        """

    def check_training(self) -> None:
        """Refuse to train what the target does not compute.

        Raises:
            ValueError: It was asked for.
        """
        self.check_code()

    @abstractmethod
    def begin(self) -> None:
        """Begin an optimizer step; nothing is left of an abandoned one."""

    @abstractmethod
    def microbatch(self, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        """Take a microbatch of an optimizer step; at the last one, all of them have run.

        Args:
            inputs: What the model is called with.
            num_items: As transformers counts them; ``None`` where the loss does not ask.

        Returns:
            The weighted losses of those that have run, 0 if none has.
        """

    def train_sampler(self, sampler: Sampler[int] | None) -> Sampler[int] | None:
        """Return the sampler of the training data, perhaps another one."""
        return sampler

    def train_data(self, data: Any, make_sampler: Any) -> tuple[Any, Any]:
        """Return what this process reads of the training data, and what makes their sampler."""
        return data, make_sampler

    def operations(self, inputs: Any, number: float) -> float:  # noqa: ARG002
        """Return how many of the operations of a microbatch are counted here."""
        return number

    def total(self, number: float) -> float:
        """Return the sum of what every process has counted of its share of the data."""
        return number

    def counted(self, batches: list[Any], num_items: Any) -> tuple[list[Any], Any]:
        """Return the batches of an optimizer step, and the items of all processes."""
        return batches, num_items

    # ---- evaluation ---------------------------------------------------------------------

    @abstractmethod
    def predict(self, bodies: Sequence[Callable[[], Prediction]]) -> list[Prediction]:
        """Run code that predicts a batch each; its calls of the model run in the stages."""

    def generates(self) -> bool:
        """Whether transformers' own predictions generate in the stages, with weights of now."""
        return False

    # ---- the run ------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Surround the training, an evaluation or a prediction."""
        yield

    def fetch(self, *, optimizer: bool = False) -> None:  # noqa: B027 - they are here
        """Bring the weights here up to date, and the optimizer's state if asked."""

    def await_files(self, folder: str) -> None:  # noqa: B027 - one process has written them
        """Return when the files of a model are in ``folder``."""

    def has_executable(self) -> bool:
        """Whether there is one of the present model."""
        return self.executable is not None and self.executable.model is self._trainer.model

    def close(self) -> None:
        """Free what runs the model; the next step compiles it anew."""
        made, self.executable = self.executable, None
        if made is not None:
            made.close()


class CollectedSteps(TargetSteps):
    """Steps of a target that runs all microbatches of an optimizer step in one call.

    Weights are elsewhere until they are fetched.

    Attributes:
        inside_step: Why no callback of the user's acts there, for a message.
        runs_alone: What runs the model, for a message.
    """

    inside_step: ClassVar[str]
    runs_alone: ClassVar[str]

    def __init__(self, trainer: PipelineMixin) -> None:
        super().__init__(trainer)
        self._waiting: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Begin an optimizer step; nothing is left of an abandoned one."""
        self._waiting.clear()

    def microbatch(self, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        """Take a microbatch; the last one of an optimizer step runs them all."""
        trainer = self._trainer
        self._waiting.append(dict(inputs))
        if len(self._waiting) < trainer.current_gradient_accumulation_steps:
            return torch.zeros((), device=trainer.args.device)
        parts, self._waiting = self._waiting, []
        loss = self.step(parts, num_items)
        trainer._finite.add(trainer.state.global_step, loss)
        return torch.tensor(loss, device=trainer.args.device)

    def check_training(self) -> None:
        """Refuse to train what the target does not compute.

        Raises:
            ValueError: The loss is computed outside of the model, or a callback acts in a step.
        """
        for callback in self._trainer.callback_handler.callbacks:
            for event in _INSIDE_STEP:
                if is_users(callback, event):
                    raise ValueError(
                        f"{type(callback).__name__}.{event} acts inside an optimizer step, "
                        f"{self.inside_step}; use on_step_end, or target='local'"
                    )
        self.check_code()

    def check_code(self) -> None:
        """Refuse code of the trainer's class that the target does not run.

        Raises:
            ValueError: The loss is computed outside of the model.
        """
        if not self._trainer._loss_is_the_models():
            raise ValueError(
                "the loss is computed outside of the model (training_step, compute_loss, "
                f"compute_loss_func or label_smoothing_factor), and {self.runs_alone}; compute it "
                "in the model's forward, or use target='local'"
            )

    def watch_callbacks(self) -> None:
        """Fetch weights before callbacks that may read them."""
        handler: Any = self._trainer.callback_handler
        call = handler.call_event

        def called(event: str, *args: Any, **kwargs: Any) -> Any:
            if self.is_read_at(event):
                if event in _EVERY_STEP:
                    logger.warning_once(
                        "weights are fetched in every step, because a callback may read them in %s",
                        event,
                    )
                self.fetch()
                return self.decided(partial(call, event, *args, **kwargs))
            return call(event, *args, **kwargs)

        handler.call_event = called

    def decided(self, call: Callable[[], Any]) -> Any:
        """Call the callbacks of an event; return what they decide."""
        return call()

    def is_read_at(self, event: str) -> bool:
        """Whether a callback may read weights at an event."""
        return event in self._events_of_users()

    def _events_of_users(self) -> list[str]:
        """Return the events at which callbacks act that are not transformers' own."""
        callbacks = self._trainer.callback_handler.callbacks
        return [e for e in _EVENTS if any(is_users(callback, e) for callback in callbacks)]

    def _optimizer(self) -> Any:
        """Return torch's optimizer in accelerate's; ``None`` before there is one."""
        wrapped: Any = self._trainer.optimizer
        return getattr(wrapped, "optimizer", wrapped)

    @abstractmethod
    def step(self, parts: Sequence[Mapping[str, Any]], num_items: Any) -> float:
        """Run all microbatches of an optimizer step; return the loss of the step.

        Args:
            parts: Inputs of each, of all replicas.
            num_items: As transformers counts them; ``None`` where the loss does not ask.
        """


def as_output(result: EvalResult) -> ModelOutput:
    """Return what the stages computed in the form in which models of transformers return it."""
    output = ModelOutput()
    if result.loss is not None:
        output["loss"] = torch.tensor(result.loss)
    for name, value in result.outputs.items():
        output[name] = value
    return output


def is_users(callback: TrainerCallback, event: str) -> bool:
    """Whether somebody else than transformers wrote the callback's method."""
    method = getattr(type(callback), event, None)
    return not (getattr(method, "__module__", None) or "transformers").startswith("transformers")
