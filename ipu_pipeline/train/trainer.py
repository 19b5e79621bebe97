"""transformers' ``Trainer`` over a pipeline: the same loop, the same files, other steps.

The inherited loop reads ``gradient_accumulation_steps`` batches per optimizer step and calls
``training_step`` for each. Here a call hands its batch in, and the last one runs them all through
the pipeline as its microbatches. So data, padding, logs, schedules, clipping and checkpoints are
the inherited ones; nothing else of the loop is replaced. What is computed outside the model
(label smoothing, ``compute_loss_func``, an overridden ``compute_loss``, all of ``prediction_step``)
runs live in the last stage (``live_loss.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate.utils.operations import convert_to_fp32  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging
from typing_extensions import Self

from ipu_pipeline import compiler
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.local.executable import LocalExecutable
from ipu_pipeline.capture.inputs import NUM_ITEMS
from ipu_pipeline.errors import StageError
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.training import autocast_region
from ipu_pipeline.train.device_steps import DeviceSteps
from ipu_pipeline.train.live_loss import (
    RUN,
    HandedIn,
    LiveLoss,
    LossRun,
    abandon,
    calls_of,
    trainable,
)
from ipu_pipeline.train.order import MicrobatchOrder, Watch, WatchedRun
from ipu_pipeline.train.output_folder import (
    begin_run,
    begin_trainer_checkpoint,
    run_of_trainer_checkpoint,
    trainer_run,
)
from ipu_pipeline.train.prefetch import Prefetch
from ipu_pipeline.train.progress import FiniteLosses
from ipu_pipeline.train.trainer_checks import (
    check_arguments,
    check_class,
    check_plan,
    check_target,
    inherited_from,
    recomputes,
    switch_off_checkpointing,
)

logger = logging.get_logger(__name__)
# Enough for every stage to be busy most of the time, as in eval_step.
_AHEAD_PER_STAGE = 2

_COMPUTE_LOSS = Trainer.compute_loss
_NO_SUBSTEP = TrainerCallback.on_substep_end
# What is no state of the user's code.
_OWN_STATE = frozenset(
    {"_handed_in", "_ahead", "_live", "_executable", "_num_trained", "_watch", "plan", "_make_plan",
     "_training_order", "_evaluation_order", "_given_plan", "_run_id", "_finite", "_device"}
)  # fmt: skip
Prediction = tuple[Tensor | None, Any, Any]
T = TypeVar("T")


class PipelineTrainer(Trainer):
    """A ``transformers.Trainer`` whose steps run through a pipeline, in this process or on IPUs.

    ``gradient_accumulation_steps`` is the number of microbatches: with 1 the stages take turns.
    Until there is a plan (no training step was made, none was given), evaluation runs the model
    as it is.

    Args:
        *args: As for ``transformers.Trainer``.
        plan: A plan or its file; ``None`` makes one from the first microbatch.
        machine: As for :func:`ipu_pipeline.plan`, used where a plan is made.
        num_stages: The same.
        costs: The same. What is ``None`` is taken from our ``TrainingArguments``, if ``args`` are.
        target: ``local`` or ``poptorch``; others need :func:`ipu_pipeline.train.train`.
        ipu_config: For ``poptorch``: what to plan with, and what the plan does not say.
        sdk_python: For ``poptorch``, as for :func:`ipu_pipeline.compile`.
        **kwargs: As for ``transformers.Trainer``.

    Attributes:
        plan: The plan in use; ``None`` until one is made.
        loss_in_order: Set in a subclass, makes each microbatch end before the next one begins, as
            in transformers' Trainer; without it that is decided by what ``compute_loss`` does.

    Raises:
        ValueError: An argument asks for what the pipeline cannot do.
        PlanError: The plan's file cannot be read.
    """

    loss_in_order = False

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """Look at the class first: the other bases may not take the arguments."""
        check_class(cls, PipelineTrainer)
        return super().__new__(cls)

    def __init__(
        self,
        *args: Any,
        plan: Plan | str | Path | None = None,
        machine: str | Machine | None = None,
        num_stages: int | None = None,
        costs: str | None = None,
        target: str = "local",
        ipu_config: IPUConfig | None = None,
        sdk_python: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_target(target)
        self._device: DeviceSteps | None = None
        if target == "poptorch":
            self._device = DeviceSteps(self, ipu_config, sdk_python)
        self._given_plan: Plan | None = None
        self._executable: LocalExecutable | None = None
        self._handed_in: list[HandedIn] = []
        self._ahead: dict[int, Prediction] = {}
        self._live = LiveLoss()
        self._num_trained = 0
        self._training_order, self._evaluation_order = MicrobatchOrder(), MicrobatchOrder()
        self._watch: Watch | None = None
        self._run_id, self._finite = "", FiniteLosses()
        super().__init__(*args, **kwargs)
        plan = plan or getattr(self.args, "plan", None)
        self._given_plan = Plan.load(plan) if isinstance(plan, str | Path) else plan
        if self._given_plan is not None:
            check_plan(self._given_plan, self.args)
        self.plan = self._given_plan
        self._make_plan = partial(
            compiler.plan,
            machine=machine or getattr(self.args, "machine", None) or "local",
            num_stages=num_stages or getattr(self.args, "num_stages", None),
            microbatches=self.args.gradient_accumulation_steps,
            costs=costs or str(getattr(self.args, "costs", "analytic")),
            replicas=getattr(self.args, "replicas", 1),
            config=ipu_config,
        )
        if self._device is not None:
            self._device.watch_callbacks()

    # ---- the run and its folder ---------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001 - the inherited signature
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Train as transformers' Trainer does, with ``output_dir`` for this process alone.

        ``True`` resumes the newest checkpoint of the last run there, whatever older ones left.

        Raises:
            CheckpointError: Another process trains into the folder.
            ValueError: There is no checkpoint to resume.
            StageError: Losses or gradients were not finite from the first step on.
        """
        folder = Path(str(self.args.output_dir))
        saves = self.args.save_strategy != SaveStrategy.NO
        self._run_id, self._finite = "", FiniteLosses()
        if self._device is not None:
            self._device.check_training()
        run = trainer_run(folder, resume_from_checkpoint=resume_from_checkpoint, saves=saves)
        with run as (path, self._run_id):
            output = super().train(path, *args, **kwargs)
        self._fetch()
        if self.hp_search_backend is None:  # a trial of a search may fail, the others go on
            self._finite.check_trained(self._whole_model, self.state.global_step)
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as transformers does, and say in the checkpoint of which run it is."""
        folder, before = Path(self._get_output_dir(trial)), self.state.best_model_checkpoint
        if not self._run_id:  # a callback has asked for it, without any save_strategy
            self._run_id = begin_run(folder, None, run_of_trainer_checkpoint)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        begin_trainer_checkpoint(folder / name, self._run_id)
        self._fetch(optimizer=not self.args.save_only_model)
        super()._save_checkpoint(model, trial)
        best = self.state.best_model_checkpoint
        if best != before and run_of_trainer_checkpoint(Path(str(best))) != self._run_id:
            self.state.best_model_checkpoint = before  # an older run's, of the step of the best

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the model as transformers does, with the weights of now."""
        self._fetch()
        super().save_model(*args, **kwargs)

    def _load_best_model(self) -> None:
        self._fetch()  # the device's weights are not newer than those that are loaded
        super()._load_best_model()

    def _fetch(self, *, optimizer: bool = False) -> None:
        """Bring the weights here up to date, and the optimizer's state if asked."""
        if self._device is not None:
            self._device.fetch(optimizer=optimizer)

    # ---- training -----------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Read the batches of the next optimizer step; nothing is left of an abandoned one."""
        abandon(self._handed_in)
        self._num_trained = 0
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Hand in one microbatch; the last one of an optimizer step runs the pipeline.

        Returns:
            The loss of all microbatches at the last of them, 0 at the others.
        """
        model.train()
        to_training_mode = getattr(self.optimizer, "train", None)  # schedule-free optimizers
        if to_training_mode is not None:
            to_training_mode()
        prepared = self._prepare_inputs(inputs)
        steps = self.current_gradient_accumulation_steps
        if self._device is not None:
            self._handed_in.append(HandedIn(dict(prepared)))
            if len(self._handed_in) < steps:
                return torch.zeros((), device=self.args.device)
            parts, self._handed_in = [part.inputs for part in self._handed_in], []
            loss = self._device.step(parts, num_items_in_batch)
            self._finite.add(self.state.global_step, loss)
            return torch.tensor(loss, device=self.args.device)
        weight = 1.0 if self._loss_is_whole(num_items_in_batch) else 1 / steps
        if reason := self._why_one_by_one():
            self._training_order.one_by_one(reason)
        part = self._training_part(model, prepared, num_items_in_batch)
        if part.run is not None and part.run.finished:
            return self._trained_in_one_piece(part.run, weight)
        self._handed_in.append(part)
        overlapped = self._training_order.overlaps(watched=isinstance(part.run, WatchedRun))
        if overlapped and len(self._handed_in) + self._num_trained < steps:
            return torch.zeros((), device=self.args.device)
        return self._trained(weight)

    def _training_part(
        self, model: nn.Module, prepared: dict[str, Any], num_items: Tensor | int | None
    ) -> HandedIn:
        if self._loss_is_the_models():
            part = dict(prepared)
            if num_items is not None and self.model_accepts_loss_kwargs:
                part[NUM_ITEMS] = num_items
            return HandedIn.of(part)

        def body() -> Tensor:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, prepared, num_items_in_batch=num_items)
            return trainable(loss)

        return self._begun(body, self._training_order, self._handed_in)

    def _trained(self, weight: float) -> Tensor:
        """Run what was handed in; return the weighted sum of its losses."""
        parts, self._handed_in = self._handed_in, []
        first, moment = self._num_trained, self._moment()
        self._num_trained = (first + len(parts)) % self.current_gradient_accumulation_steps
        weights = [weight] * len(parts)
        try:
            losses = self._run(
                parts, lambda made, inputs: made.forward_backward_parts(inputs, weights, first)
            )
        finally:
            moment()
        for part in parts:
            if part.run is not None:
                part.run.backward_into_inputs()
        self._settle(parts, self._training_order)
        self._finite.add(self.state.global_step, sum(losses))
        return torch.tensor(sum(losses) * weight, device=self.args.device)

    def _trained_in_one_piece(self, run: LossRun, weight: float) -> Tensor:
        self._training_order.one_by_one(
            "compute_loss has not called the model with gradients and in training mode, so that "
            "all of it runs in one piece"
        )
        done = self._num_trained + 1
        self._num_trained = done % self.current_gradient_accumulation_steps
        loss = cast(Tensor, run.result) * weight
        loss.backward()
        self._finite.add(self.state.global_step, float(loss.detach()))
        return loss.detach()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if self._device is None:
            return sampler
        return self._device.train_sampler(sampler)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return no norm where gradients stay on the device, which has clipped them."""
        return None if self._device is not None else super()._get_grad_norm(model, grad_norm)

    def _why_one_by_one(self) -> str:
        """Say what acts between two microbatches; nothing if nothing does."""
        if self.loss_in_order:
            return "loss_in_order is set"
        step = getattr(self.training_step, "__func__", None)
        if step is not _TRAINING_STEP:
            return f"training_step of {type(self).__name__} is given the loss of each"
        for callback in self.callback_handler.callbacks:
            if getattr(callback.on_substep_end, "__func__", None) is not _NO_SUBSTEP:
                return f"{type(callback).__name__} has on_substep_end"
        return ""

    def _moment(self) -> Callable[[], None]:
        """Return what puts back the counters that the inherited loop sets for a microbatch."""
        gradients, tokens = self.accelerator.gradient_state, self.state.num_input_tokens_seen
        sync = gradients.sync_gradients

        def put_back() -> None:
            gradients._set_sync_gradients(sync)
            self.state.num_input_tokens_seen = tokens

        return put_back

    def _loss_is_the_models(self) -> bool:
        """Whether nothing is computed behind the model, so that the stages compute it all."""
        return self._loss_is_inherited() and self.label_smoother is None

    def _loss_is_inherited(self) -> bool:
        inherited = getattr(self.compute_loss, "__func__", None) is _COMPUTE_LOSS
        return inherited and self.compute_loss_func is None

    def _loss_is_whole(self, num_items: Tensor | int | None) -> bool:
        """Whether the microbatches' losses add up, instead of having a mean."""
        said = getattr(self, "loss_is_scaled_for_ga", None)  # newer than transformers 5.0
        if said is not None:
            return bool(said)
        counted = self.model_accepts_loss_kwargs and num_items is not None
        return counted or self.compute_loss_func is not None

    # ---- evaluation ---------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,  # noqa: FBT001 - the inherited signature
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate, several batches in the pipeline at once, each with its own loss."""
        own_step = getattr(self.prediction_step, "__func__", None) is _PREDICTION_STEP
        if own_step and self._device is None and self._evaluates_in_stages():
            assert self.plan is not None
            loss_only = self.args.prediction_loss_only
            loss_only = loss_only if prediction_loss_only is None else prediction_loss_only
            run = partial(self._run_ahead, loss_only=loss_only, ignore_keys=ignore_keys)
            dataloader = Prefetch(dataloader, _AHEAD_PER_STAGE * self.plan.num_stages, run)
        try:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._ahead = {}

    def prediction_step(
        self,
        model: nn.Module,  # noqa: ARG002 - the inherited signature
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: FBT001 - the inherited signature
        ignore_keys: list[str] | None = None,
    ) -> Prediction:
        """Return loss, logits and labels of one batch, nested as transformers nests them."""
        if id(inputs) not in self._ahead:
            self._run_ahead([inputs], loss_only=prediction_loss_only, ignore_keys=ignore_keys)
        return self._ahead.pop(id(inputs))

    def _run_ahead(
        self, batches: list[dict[str, Any]], *, loss_only: bool, ignore_keys: list[str] | None
    ) -> None:
        """Predict batches; their results are taken one by one."""
        predict = super().prediction_step
        bodies = [
            partial(predict, self._whole_model, batch, loss_only, ignore_keys) for batch in batches
        ]
        if self._evaluates_in_stages():
            predicted = self._predicted if self._device is None else self._device.predict
            found = predicted(bodies)
        else:
            self._fetch()
            with calls_of(self._whole_model, self._in_one_piece):
                found = [body() for body in bodies]
        self._ahead = {id(b): result for b, result in zip(batches, found, strict=True)}

    def _predicted(self, bodies: Sequence[Callable[[], Prediction]]) -> list[Prediction]:
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

    def _evaluates_in_stages(self) -> bool:
        inherited = inherited_from(type(self), PipelineTrainer, "prediction_step")
        if inherited is not Trainer and not (
            inherited is Seq2SeqTrainer and not getattr(self.args, "predict_with_generate", False)
        ):
            logger.warning_once(
                "prediction_step of %s runs the model in one piece", inherited.__name__
            )
            return False
        cast_model = self.args.fp16_full_eval or self.args.bf16_full_eval
        if cast_model and not self.is_in_train:  # its weights have another type for the moment
            return False
        return self._given_plan is not None or self._has_executable()

    # ---- calls of the model -------------------------------------------------------------

    def _begun(
        self, body: Callable[[], Any], order: MicrobatchOrder, pending: list[HandedIn]
    ) -> HandedIn:
        """Run the user's code up to its call of the model: what it passes are the inputs."""
        if self._loss_is_inherited():
            run = LossRun(body)
        else:
            self._watch = self._watch or Watch(self, _OWN_STATE)
            run = WatchedRun(body, self._watch)
        run.modes, run.at_resume = self._modes(), self._moment()
        try:
            with calls_of(self._whole_model, self._called):
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
        return [module.training for module in self._whole_model.modules()]

    def _run(
        self, parts: list[HandedIn], work: Callable[[LocalExecutable, list[dict[str, Any]]], T]
    ) -> T:
        """Run microbatches through the stages; what compute_loss raises is raised as it is."""
        runs = {n: part.run for n, part in enumerate(parts) if part.run is not None}
        inputs = [part.inputs for part in parts]
        for n in runs:
            inputs[n] = {**inputs[n], RUN: torch.tensor(n)}
        try:
            with calls_of(self._whole_model, self._called, self._live if runs else None):
                executable = self._ready_executable(inputs[0])
                executable.global_step = self.state.global_step
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
                return self._widened(run.call(forward, args, kwargs))
            run.further_calls += 1
            return self._in_one_piece(forward, args, kwargs)
        if RUN in kwargs:
            return self._live.view(forward, kwargs)
        return forward(*args, **kwargs)

    def _in_one_piece(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Call the model outside of the pipeline, as accelerate does."""
        with autocast_region(self._precision, self.args.device):
            outputs = forward(*args, **kwargs)
        return self._widened(outputs)

    def _widened(self, outputs: Any) -> Any:
        """Return what accelerate hands out of its autocast: float32 in place of 16 bits."""
        return outputs if self._precision == "float32" else convert_to_fp32(outputs)

    @property
    def _precision(self) -> str:
        return "bf16" if self.args.bf16 else "float32"

    # ---- the executable -----------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Look at the arguments first: what cannot be done is refused before it is set up."""
        check_arguments(self.args, "local" if self._device is None else "poptorch")
        super().create_accelerator_and_postprocess()

    def close(self) -> None:
        """Stop the threads of the stages, or free the IPUs; the next step starts anew."""
        if self._device is not None:
            self._device.close()
        if self._executable is not None:
            self._executable.close()
            self._executable = None

    def end(self) -> None:
        """Finish the trackers and stop the threads of the stages."""
        self.close()
        super().end()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # The stages compute in their own autocast region; accelerate's would wrap forward.
        return super()._build_accelerator_args(**{**kwargs, "mixed_precision": "no"})

    @property
    def _whole_model(self) -> nn.Module:
        return cast(nn.Module, self.model)

    def _has_executable(self) -> bool:
        if self._device is not None:
            return self._device.has_executable()
        return self._executable is not None and self._executable.model is self.model

    def _ready_executable(self, part: Mapping[str, Any]) -> LocalExecutable:
        """Return the executable of the present model (``model_init`` makes new ones)."""
        if not self._has_executable():
            self.close()
            self._executable = self._compile(part)
        assert self._executable is not None
        return self._executable

    def planned(self, part: Mapping[str, Any]) -> Plan:
        """Return the plan of the present model; it is made from one microbatch if none was given.

        Args:
            part: The microbatch.
        """
        self.plan = self._given_plan or self._make_plan(self._whole_model, part)
        logger.info("%s", self.plan.explain())
        return self.plan

    def _compile(self, part: Mapping[str, Any]) -> LocalExecutable:
        model, again = self._whole_model, recomputes(self.args)
        if again:  # the inherited train() switched the model's own recomputation on
            switch_off_checkpointing(model)
        with torch.random.fork_rng(devices=[]):
            executable = compiler.compile(
                model,
                self.planned(part),
                precision=self._precision,
                seed=self.args.seed,
                recompute="all" if again else None,
            )
        return cast(LocalExecutable, executable)


_PREDICTION_STEP = PipelineTrainer.prediction_step
_TRAINING_STEP = PipelineTrainer.training_step
