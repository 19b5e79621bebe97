"""Steps that run the trainer's own code around the model, whose calls run in the stages.

What is computed outside the model (label smoothing, ``compute_loss_func``, a ``training_step``,
``compute_loss`` or ``prediction_step`` of a subclass or of another base) runs live
(``live_loss.py``): up to its call of the model when a microbatch is handed in, then in the last
stage, then behind the backward pass.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ipu_pipeline.capture.inputs import NUM_ITEMS
from ipu_pipeline.errors import StageError
from ipu_pipeline.stages.executable import Executable
from ipu_pipeline.train.live_loss import (
    RUN,
    HandedIn,
    LiveLoss,
    LossRun,
    abandon,
    calls_of,
    generates,
    is_replaced,
    unseen,
)
from ipu_pipeline.train.optimizers import loss_factor
from ipu_pipeline.train.order import MicrobatchOrder, Watch, WatchedRun
from ipu_pipeline.train.steps import Prediction, TargetSteps

if TYPE_CHECKING:
    from ipu_pipeline.train.mixin import PipelineMixin

# What is no state of the user's code.
_OWN_STATE = frozenset(
    {"_steps", "plan", "_make_plan", "_given_plan", "_run_id", "_finite", "_noise"}
    | {"_step_of_the_loop", "training_step"}
)
T = TypeVar("T")


class LiveSteps(TargetSteps):
    """The steps of a trainer whose code runs around the stages.

    Attributes:
        training_order: Whether microbatches overlap.
    """

    def __init__(self, trainer: PipelineMixin) -> None:
        super().__init__(trainer)
        self.training_order, self._evaluation_order = MicrobatchOrder(), MicrobatchOrder()
        self._handed_in: list[HandedIn] = []
        self._live = LiveLoss()
        self._num_trained = 0
        self._watch: Watch | None = None

    def begin(self) -> None:
        """Begin an optimizer step; nothing is left of an abandoned one."""
        abandon(self._handed_in)
        self._num_trained = 0
        self._trainer._noise.begin()

    # ---- training -----------------------------------------------------------------------

    def microbatch(self, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        """Hand in a microbatch whose loss is the model's; they run when all of them are there."""
        part = dict(inputs)
        if num_items is not None and self._trainer.model_accepts_loss_kwargs:
            part[NUM_ITEMS] = num_items
        self._trainer._noise.draw(self._position, part)
        return self._add(HandedIn.of(part), 1.0 if self._is_whole(num_items) else 1 / self._number)

    def live_microbatch(self, body: Callable[[], Any]) -> Tensor:
        """Hand in a microbatch by code that trains on it; they run when all of them are there.

        Args:
            body: The code: a ``training_step`` with its arguments.

        Returns:
            What the code of those that have run has returned, added up; 0 if none has.
        """
        watched = not self._trainer._loss_is_inherited()
        part = self._begun(body, self.training_order, self._handed_in, watched=watched)
        if part.run is not None and part.run.finished:
            return self._trained_in_one_piece(part.run)
        return self._add(part, 1.0)

    def _add(self, part: HandedIn, weight: float) -> Tensor:
        if reason := self._trainer._why_one_by_one():
            self.training_order.one_by_one(reason)
        self._handed_in.append(part)
        overlapped = self.training_order.overlaps(watched=isinstance(part.run, WatchedRun))
        if overlapped and self._position < self._number:
            return torch.zeros((), device=self._trainer.args.device)
        return self._trained(weight)

    @property
    def _number(self) -> int:
        """Microbatches of this optimizer step."""
        return int(self._trainer.current_gradient_accumulation_steps)

    @property
    def _position(self) -> int:
        """That of the next microbatch in the optimizer step."""
        return self._num_trained + len(self._handed_in)

    def _is_whole(self, num_items: Tensor | int | None) -> bool:
        return self._trainer._loss_is_whole(num_items)

    def _trained(self, weight: float) -> Tensor:
        """Run what was handed in; return the sum of its losses."""
        parts, self._handed_in = self._handed_in, []
        first, moment = self._num_trained, self._moment()
        self._num_trained = (first + len(parts)) % self._number
        factor = weight * loss_factor(self._trainer.accelerator)
        weights = [factor if part.run is None else 1.0 for part in parts]
        try:
            losses = self._train(parts, weights, first)
            for n, part in enumerate(parts):
                if part.run is not None:
                    self._finish(part.run, first + n, alone=len(parts) == 1)
        except BaseException:
            abandon(parts)
            raise
        finally:
            moment()
        self._settle(parts, self.training_order)
        return self._total(
            loss * weight if part.run is None else float(part.run.result)
            for part, loss in zip(parts, losses, strict=True)
        )

    def _finish(self, run: LossRun, position: int, *, alone: bool) -> None:
        """Run the code behind the backward pass, and further rounds if it calls the model again."""
        run.backward_into_inputs()
        self._go_on(run)
        while not run.finished:
            self.training_order.settle(run, alone=alone)
            part = HandedIn.of(run.inputs or {}, run)
            self._train([part], [1.0], position + self._number * run.rounds)
            run.backward_into_inputs()
            self._go_on(run)

    def _go_on(self, run: LossRun) -> None:
        run.at_resume()
        with calls_of(self._trainer._whole_model, self._called):
            run.go_on()

    def _train(self, parts: list[HandedIn], weights: list[float], first: int) -> list[float]:
        """Run microbatches forward and backward; return the losses they began at."""

        def work(made: Any, inputs: list[dict[str, Any]]) -> list[float]:
            losses: list[float] = made.forward_backward_parts(inputs, weights, first)
            return losses

        return self._run(parts, work)

    def _trained_in_one_piece(self, run: LossRun) -> Tensor:
        self.training_order.one_by_one(
            "compute_loss has not called the model with gradients and in training mode, so that "
            "all of it runs in one piece"
        )
        self._num_trained = (self._num_trained + 1) % self._number
        return self._total([float(run.result)])

    def _total(self, losses: Any) -> Tensor:
        total = sum(losses)
        self._trainer._finite.add(self._trainer.state.global_step, total)
        return torch.tensor(total, device=self._trainer.args.device)

    def _moment(self) -> Callable[[], None]:
        """Return what puts back the counters that the inherited loop sets for a microbatch."""
        state, gradients = self._trainer.state, self._trainer.accelerator.gradient_state
        sync, tokens = gradients.sync_gradients, state.num_input_tokens_seen

        def put_back() -> None:
            gradients._set_sync_gradients(sync)
            state.num_input_tokens_seen = tokens

        return put_back

    # ---- evaluation ---------------------------------------------------------------------

    def predict(self, bodies: Sequence[Callable[[], Prediction]]) -> list[Prediction]:
        """Run code that predicts a batch each; its calls of the model run together."""
        order, found = self._evaluation_order, list[Prediction]()
        watched = not self._trainer._prediction_is_inherited()
        pending: list[HandedIn] = []
        for n, body in enumerate(bodies, start=1):
            part = self._begun(body, order, pending, watched=watched)
            pending.append(part)
            if n == len(bodies) or not order.overlaps(watched=isinstance(part.run, WatchedRun)):
                suspended = [part for part in pending if part.run and not part.run.finished]
                if suspended:
                    self._run(suspended, lambda made, inputs: made.eval_parts(inputs))
                self._settle(pending, order)
                found += [part.run.result for part in pending if part.run is not None]
                pending = []
        return found

    # ---- calls of the model -------------------------------------------------------------

    def _begun(
        self,
        body: Callable[[], Any],
        order: MicrobatchOrder,
        pending: list[HandedIn],
        *,
        watched: bool,
    ) -> HandedIn:
        """Run the user's code up to its call of the model: what it passes are the inputs."""
        if watched:
            self._watch = self._watch or Watch(self._trainer, _OWN_STATE)
            run: LossRun = WatchedRun(body, self._watch)
        else:
            run = LossRun(body)
        run.modes, run.at_resume = self._modes(), self._moment()
        self._prepare(run)
        try:
            with calls_of(self._trainer._whole_model, self._called):
                run.start()
            if isinstance(run, WatchedRun) and run.conflict(alone=not pending):
                order.settle(run, alone=not pending)
        except BaseException:
            run.abandon()
            abandon(pending)
            raise
        return HandedIn.of(run.inputs or {}, run)

    def _prepare(self, run: LossRun) -> None:
        """Prepare a run that is about to begin."""
        if self._trainer._whole_model.training:
            position = self._position

            def draw(inputs: dict[str, Any]) -> None:
                self._trainer._noise.draw(position + self._number * run.rounds, inputs)

            run.at_call = draw

    def _settle(self, parts: list[HandedIn], order: MicrobatchOrder) -> None:
        for part in parts:
            if part.run is not None:
                order.settle(part.run, alone=len(parts) == 1, agree=self._agree)

    def _agree(self, reason: str) -> str:
        """Return what all processes say of a run."""
        return reason

    def _modes(self) -> list[bool]:
        return [module.training for module in self._trainer._whole_model.modules()]

    def _run(self, parts: list[HandedIn], work: Callable[[Any, list[dict[str, Any]]], T]) -> T:
        """Run microbatches through the stages; what the code in them raises is raised as it is."""
        runs = {n: part.run for n, part in enumerate(parts) if part.run is not None}
        inputs = [part.inputs for part in parts]
        for n in runs:
            inputs[n] = {**inputs[n], RUN: torch.tensor(n)}
        try:
            with calls_of(self._trainer._whole_model, self._called, self._live if runs else None):
                executable = self._ready(inputs[0])
                executable.global_step = self._trainer.state.global_step
                self._live.runs = runs  # from here on; a plan is made with the stand-in
                return work(executable, inputs)
        except BaseException as error:
            failed = [(n, run) for n, run in runs.items() if run.error is not None]
            abandon(parts)
            if isinstance(error, StageError) and failed:
                n, run = failed[0]
                assert run.error is not None
                notes = run.error.__dict__.setdefault("__notes__", [])  # add_note of Python 3.11
                notes.append(f"raised in the pipeline, for microbatch {n}: {error}")
                raise run.error from None
            raise
        finally:
            self._live.runs = {}

    def _called(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Answer a call of the model: by the user's code, or by a capture."""
        run, model = LossRun.current(), self._trainer._whole_model
        if run is not None:
            whole = is_replaced(model)
            if not whole and run.may_suspend(self._modes(), kwargs):
                return self._trainer._widened(run.call(forward, args, kwargs))
            run.further_calls += not generates(kwargs)
            with self._further_call(run), unseen(model):
                return self._trainer._in_one_piece(forward, args, kwargs)
        if RUN in kwargs:

            def hidden(*given: Any, **named: Any) -> Any:
                with unseen(model):
                    return forward(*given, **named)

            return self._live.view(hidden, kwargs)
        return forward(*args, **kwargs)

    def _further_call(self, run: LossRun) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Surround a call of the whole model, for which the weights are made ready."""
        return contextlib.nullcontext()

    @abstractmethod
    def _ready(self, part: Mapping[str, Any]) -> Executable:
        """Return the executable of the present model."""
