"""Steps in this process: microbatches run through the stages with what is computed around them.

What is computed outside the model (label smoothing, ``compute_loss_func``, an overridden
``compute_loss``, all of ``prediction_step``) runs live in the last stage (``live_loss.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ipu_pipeline.backends.local.executable import LocalExecutable
from ipu_pipeline.capture.inputs import NUM_ITEMS
from ipu_pipeline.errors import StageError
from ipu_pipeline.train.live_loss import (
    RUN,
    HandedIn,
    LiveLoss,
    LossRun,
    abandon,
    calls_of,
    trainable,
)
from ipu_pipeline.train.optimizers import loss_factor
from ipu_pipeline.train.order import MicrobatchOrder, Watch, WatchedRun
from ipu_pipeline.train.steps import Prediction, TargetSteps

if TYPE_CHECKING:
    from ipu_pipeline.train.trainer import PipelineTrainer

# What is no state of the user's code.
_OWN_STATE = frozenset({"_steps", "plan", "_make_plan", "_given_plan", "_run_id", "_finite"})
T = TypeVar("T")


class LocalSteps(TargetSteps):
    """The steps of a trainer whose stages are threads of this process.

    Attributes:
        training_order: Whether microbatches overlap.
    """

    target = "local"

    def __init__(self, trainer: PipelineTrainer) -> None:
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

    # ---- training -----------------------------------------------------------------------

    def microbatch(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> Tensor:
        """Hand in one microbatch; they run when all of them are there, or each in its turn.

        Returns:
            The loss of those that have run, 0 if none has.
        """
        trainer = self._trainer
        steps = trainer.current_gradient_accumulation_steps
        weight = 1.0 if trainer._loss_is_whole(num_items) else 1 / steps
        if reason := trainer._why_one_by_one():
            self.training_order.one_by_one(reason)
        part = self._training_part(model, inputs, num_items)
        if part.run is not None and part.run.finished:
            return self._trained_in_one_piece(part.run, weight)
        self._handed_in.append(part)
        overlapped = self.training_order.overlaps(watched=isinstance(part.run, WatchedRun))
        if overlapped and len(self._handed_in) + self._num_trained < steps:
            return torch.zeros((), device=trainer.args.device)
        return self._trained(weight)

    def _training_part(
        self, model: nn.Module, prepared: dict[str, Any], num_items: Tensor | int | None
    ) -> HandedIn:
        if self._trainer._loss_is_the_models():
            part = dict(prepared)
            if num_items is not None and self._trainer.model_accepts_loss_kwargs:
                part[NUM_ITEMS] = num_items
            return HandedIn.of(part)

        def body() -> Tensor:
            with self._trainer.compute_loss_context_manager():
                loss = self._trainer.compute_loss(model, prepared, num_items_in_batch=num_items)
            return trainable(loss)

        return self._begun(body, self.training_order, self._handed_in)

    def _trained(self, weight: float) -> Tensor:
        """Run what was handed in; return the weighted sum of its losses."""
        parts, self._handed_in = self._handed_in, []
        first, moment = self._num_trained, self._moment()
        self._num_trained = (first + len(parts)) % self._trainer.current_gradient_accumulation_steps
        weights = [weight * loss_factor(self._trainer.accelerator)] * len(parts)
        try:
            losses = self._run(
                parts, lambda made, inputs: made.forward_backward_parts(inputs, weights, first)
            )
        finally:
            moment()
        for part in parts:
            if part.run is not None:
                part.run.backward_into_inputs()
        self._settle(parts, self.training_order)
        self._trainer._finite.add(self._trainer.state.global_step, sum(losses))
        return torch.tensor(sum(losses) * weight, device=self._trainer.args.device)

    def _trained_in_one_piece(self, run: LossRun, weight: float) -> Tensor:
        self.training_order.one_by_one(
            "compute_loss has not called the model with gradients and in training mode, so that "
            "all of it runs in one piece"
        )
        done = self._num_trained + 1
        self._num_trained = done % self._trainer.current_gradient_accumulation_steps
        loss = cast(Tensor, run.result) * weight
        (loss * loss_factor(self._trainer.accelerator)).backward()
        self._trainer._finite.add(self._trainer.state.global_step, float(loss.detach()))
        return loss.detach()

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
        """Run code that predicts a batch each; their calls of the model run together."""
        order, found = self._evaluation_order, list[Prediction]()
        pending: list[HandedIn] = []
        for n, body in enumerate(bodies, start=1):
            part = self._begun(body, order, pending)
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
        self, body: Callable[[], Any], order: MicrobatchOrder, pending: list[HandedIn]
    ) -> HandedIn:
        """Run the user's code up to its call of the model: what it passes are the inputs."""
        if self._trainer._loss_is_inherited():
            run = LossRun(body)
        else:
            self._watch = self._watch or Watch(self._trainer, _OWN_STATE)
            run = WatchedRun(body, self._watch)
        run.modes, run.at_resume = self._modes(), self._moment()
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

    def _settle(self, parts: list[HandedIn], order: MicrobatchOrder) -> None:
        for part in parts:
            if part.run is not None:
                order.settle(part.run, alone=len(parts) == 1)

    def _modes(self) -> list[bool]:
        return [module.training for module in self._trainer._whole_model.modules()]

    def _run(
        self, parts: list[HandedIn], work: Callable[[LocalExecutable, list[dict[str, Any]]], T]
    ) -> T:
        """Run microbatches through the stages; what compute_loss raises is raised as it is."""
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
        except StageError as error:
            for n, run in runs.items():
                if run.error is not None:
                    run.error.add_note(f"raised in the pipeline, for microbatch {n}: {error}")
                    raise run.error from None
            raise
        finally:
            self._live.runs = {}
            for run in runs.values():
                run.abandon()

    def _called(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Answer a call of the model: by compute_loss, or by a capture."""
        run = LossRun.current()
        if run is not None:
            if run.inputs is None and run.may_suspend(self._modes()):
                return self._trainer._widened(run.call(forward, args, kwargs))
            run.further_calls += 1
            return self._trainer._in_one_piece(forward, args, kwargs)
        if RUN in kwargs:
            return self._live.view(forward, kwargs)
        return forward(*args, **kwargs)

    def _ready(self, part: Mapping[str, Any]) -> LocalExecutable:
        """Return the executable of the present model (``model_init`` makes new ones)."""
        if not self.has_executable():
            self.close()
            plan = self._trainer.planned(part)
            self.executable = self._trainer.compiled(plan, precision=self._trainer._precision)
        return cast(LocalExecutable, self.executable)
