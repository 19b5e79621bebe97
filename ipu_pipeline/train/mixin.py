"""Any trainer of transformers' kind over a pipeline: its loop, its files, its code, other steps.

The inherited loop reads ``gradient_accumulation_steps`` batches per optimizer step and calls
``training_step`` for each. Here a call hands its batch in, and the last one runs them all through
the pipeline as its microbatches. So data, padding, logs, schedules, clipping and checkpoints are
the inherited ones; nothing else of the loop is replaced. A ``training_step``, ``compute_loss`` or
``prediction_step`` of a subclass or of another base runs as it is, and its calls of the model run
in the stages (``live_loss.py``). How a target makes its steps is in a file of its own:
``local_steps.py``, ``device_steps.py``, ``process_steps.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils.memory import should_reduce_batch_size  # type: ignore[import-untyped]
from accelerate.utils.operations import convert_to_fp32  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging
from typing_extensions import Self

from ipu_pipeline import compiler
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.errors import StageError
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Granularity, Plan
from ipu_pipeline.stages.training import autocast_region
from ipu_pipeline.train.device_steps import DeviceSteps
from ipu_pipeline.train.live_loss import calls_of, trainable
from ipu_pipeline.train.local_steps import LocalSteps
from ipu_pipeline.train.noise import EmbeddingNoise
from ipu_pipeline.train.optimizers import scale_gradients
from ipu_pipeline.train.output_folder import (
    begin_run,
    begin_trainer_checkpoint,
    run_of_trainer_checkpoint,
    trainer_run,
)
from ipu_pipeline.train.prefetch import Prefetch
from ipu_pipeline.train.progress import FiniteLosses
from ipu_pipeline.train.share import marking
from ipu_pipeline.train.steps import Prediction, TargetSteps
from ipu_pipeline.train.trainer_checks import (
    check_arguments,
    check_class,
    check_folder,
    check_plan,
    chosen_target,
    inherited_from,
    recomputes,
    switch_off_checkpointing,
    uncompiled,
)

if TYPE_CHECKING:
    from ipu_pipeline.train.live_steps import LiveSteps

    Base = Trainer
else:
    Base = object

logger = logging.get_logger(__name__)
# Enough for every stage to be busy most of the time, as in eval_step.
_AHEAD_PER_STAGE = 2

# With these as transformers has them, and no function for the loss, the stages compute it all.
_LOSS_METHODS = (
    "training_step",
    "compute_loss",
    "compute_loss_context_manager",
    "autocast_smart_context_manager",
    "_prepare_context_parallel_inputs",
)
_NO_SUBSTEP = TrainerCallback.on_substep_end


class PipelineMixin(Base):
    """Lets the steps of a trainer run through a pipeline: ``class X(PipelineMixin, SFTTrainer)``.

    The trainer is transformers' ``Trainer`` or any class derived from it. Its stages are threads of
    this process, processes that torchrun has started, or IPUs.

    ``gradient_accumulation_steps`` is the number of microbatches: with 1 the stages take turns.
    Until there is a plan (no training step was made, none was given), evaluation runs the model
    as it is.

    Args:
        *args: As for the trainer behind it.
        plan: A plan or its file; ``None`` makes one from the first microbatch.
        machine: As for :func:`ipu_pipeline.plan`, used where a plan is made.
        num_stages: The same.
        costs: The same. What is ``None`` is taken from our ``TrainingArguments``, if ``args`` are.
        granularity: The same; ``None`` for ``layer``.
        target: ``local``, ``poptorch`` or ``distributed``; ``None``: ``distributed`` in one of
            several processes (torchrun), each of which runs its stages, else ``local``.
        ipu_config: For ``poptorch``: what to plan with, and what the plan does not say.
        sdk_python: For ``poptorch``, as for :func:`ipu_pipeline.compile`.
        **kwargs: As for the trainer behind it.

    Attributes:
        plan: The plan in use; ``None`` until one is made.
        loss_in_order: Set in a subclass, makes each microbatch end before the next one begins, as
            in transformers' Trainer; without it that is decided by what the trainer's code does.

    Raises:
        ValueError: An argument asks for what the pipeline cannot do.
        PlanError: The plan's file cannot be read.
    """

    loss_in_order = False

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """Look at the class first: the other bases may not take the arguments."""
        check_class(cls, PipelineMixin)
        return super().__new__(cls)

    def __init__(
        self,
        *args: Any,
        plan: Plan | str | Path | None = None,
        machine: str | Machine | None = None,
        num_stages: int | None = None,
        costs: str | None = None,
        granularity: Granularity | None = None,
        target: str | None = None,
        ipu_config: IPUConfig | None = None,
        sdk_python: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._steps = self._steps_on(chosen_target(target), ipu_config, sdk_python)
        self._given_plan: Plan | None = None
        self._ahead: dict[int, Prediction] = {}
        self._step_of_the_loop: Callable[..., Tensor] | None = None
        self._run_id, self._finite, self._noise = "", FiniteLosses(), EmbeddingNoise()
        super().__init__(*args, **kwargs)
        plan = plan or getattr(self.args, "plan", None)
        self._given_plan = Plan.load(plan) if isinstance(plan, str | Path) else plan
        if self._given_plan is not None:
            asked = {"num_stages": num_stages, "granularity": granularity}
            check_plan(self._given_plan, self.args, asked)
        self.plan = self._given_plan
        replicas = int(getattr(self.args, "replicas", 1))
        self._make_plan = partial(
            compiler.plan,
            machine=machine or getattr(self.args, "machine", None) or "local",
            num_stages=num_stages
            or getattr(self.args, "num_stages", None)
            or self._steps.num_stages(replicas),
            microbatches=self.args.gradient_accumulation_steps,
            costs=costs or str(getattr(self.args, "costs", "analytic")),
            replicas=replicas,
            granularity=granularity or "layer",
            config=ipu_config,
        )
        self._steps.watch_callbacks()
        if self.train_dataset is not None:
            self._steps.check_code()

    def _steps_on(
        self, target: str, ipu_config: IPUConfig | None, sdk_python: str | None
    ) -> TargetSteps:
        if target == "poptorch":
            return DeviceSteps(self, ipu_config, sdk_python)
        if target == "distributed":
            from ipu_pipeline.train.process_steps import ProcessSteps

            return ProcessSteps(self)
        return LocalSteps(self)

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
        run = trainer_run(folder, resume_from_checkpoint=resume_from_checkpoint, saves=saves)
        agreed = self._steps.agreed
        with contextlib.ExitStack() as held, self._steps.running():
            agreed(self._steps.check_training, everywhere=True)
            path, self._run_id = agreed(lambda: held.enter_context(run))
            output = super().train(path, *args, **kwargs)
            self._steps.fetch()
        if self.hp_search_backend is None:  # a trial of a search may fail, the others go on
            self._finite.check_trained(self._whole_model, self.state.global_step)
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as transformers does, and say in the checkpoint of which run it is."""
        folder, before = Path(self._get_output_dir(trial)), self.state.best_model_checkpoint
        agreed = self._steps.agreed
        if not self._run_id:  # a callback has asked for it, without any save_strategy
            self._run_id = agreed(lambda: begin_run(folder, None, run_of_trainer_checkpoint))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        agreed(lambda: begin_trainer_checkpoint(folder / name, self._run_id))
        self._steps.fetch(optimizer=not self.args.save_only_model)
        super()._save_checkpoint(model, trial)

        def best_of_this_run() -> str | None:
            best = self.state.best_model_checkpoint
            own = best == before or run_of_trainer_checkpoint(Path(str(best))) == self._run_id
            return best if own else before  # an older run's, of the step of the best

        self.state.best_model_checkpoint = agreed(best_of_this_run)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the state of the random generators, which all processes have."""
        if self.args.should_save:
            super()._save_rng_state(output_dir)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model as transformers does, with the weights of now."""
        self._steps.fetch()
        super().save_model(output_dir, *args, **kwargs)
        if not self.is_in_train:  # what follows may read it
            self._steps.await_files(str(output_dir or self.args.output_dir))

    def _load_best_model(self) -> None:
        self._steps.fetch()  # the device's weights are not newer than those that are loaded
        best = Path(str(self.state.best_model_checkpoint))
        self._steps.agreed(lambda: check_folder(best), everywhere=True)
        super()._load_best_model()

    # ---- training -----------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Read the batches of the next optimizer step; nothing is left of an abandoned one."""
        self._steps.begin()
        return self._steps.counted(*super().get_batch_samples(*args, **kwargs))

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the inherited loop; what it calls as ``training_step`` hands a microbatch in."""
        instance = vars(self)
        before = {name: instance[name] for name in ("training_step",) if name in instance}
        self._step_of_the_loop = self.training_step
        instance["training_step"] = self._hand_in
        if self.neftune_noise_alpha is not None:
            self.neftune_hook_handle = self._noise.replace(self._whole_model)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        except StageError as error:
            cause: Any = error.__cause__
            if self.args.auto_find_batch_size and should_reduce_batch_size(cause):
                raise cause from error  # what transformers makes the batches smaller for
            raise
        finally:
            del instance["training_step"]
            self._step_of_the_loop = None
            instance.update(before)

    def _hand_in(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Hand in one microbatch; the last one of an optimizer step runs the pipeline.

        Returns:
            The loss of those that have run, 0 if none has.
        """
        model.train()
        to_training_mode = getattr(self.optimizer, "train", None)  # schedule-free optimizers
        if to_training_mode is not None:
            to_training_mode()
        if self._loss_is_the_models():
            return self._steps.microbatch(self._prepare_inputs(inputs), num_items_in_batch)
        assert self._step_of_the_loop is not None
        body = partial(self._step_of_the_loop, model, inputs, num_items_in_batch)
        return cast("LiveSteps", self._steps).live_microbatch(body)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Have another plan made, for the other size."""
        self.close()
        super()._update_auto_batch_size(batch_size)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self._steps.train_sampler(super()._get_train_sampler(train_dataset))

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loader of some data, of training data perhaps a share of them."""
        if kwargs.get("is_training"):
            found = self._steps.train_data(dataset, kwargs.get("sampler_fn"))
            dataset, kwargs["sampler_fn"] = found
        return super()._get_dataloader(dataset, *args, **kwargs)

    def _get_collator_with_removed_columns(self, *args: Any, **kwargs: Any) -> Any:
        return marking(super()._get_collator_with_removed_columns(*args, **kwargs))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a microbatch; none of one that another process counts."""
        return int(self._steps.operations(inputs, super().floating_point_ops(inputs)))

    def store_flos(self) -> None:
        """Keep the operations of all processes in the state."""
        self.current_flos = int(self._steps.total(float(self.current_flos)))
        super().store_flos()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return no norm where gradients stay on the device, which has clipped them."""
        return super()._get_grad_norm(model, grad_norm) if self._steps.has_gradients else None

    def _why_one_by_one(self) -> str:
        """Say what acts between two microbatches; nothing if nothing does."""
        if self.loss_in_order:
            return "loss_in_order is set"
        for callback in self.callback_handler.callbacks:
            if getattr(callback.on_substep_end, "__func__", None) is not _NO_SUBSTEP:
                return f"{type(callback).__name__} has on_substep_end"
        return ""

    def _loss_is_the_models(self) -> bool:
        """Whether nothing is computed behind the model, so that the stages compute it all."""
        of_gpus = getattr(self.args, "torch_empty_cache_steps", None)
        return self._loss_is_inherited() and self.label_smoother is None and of_gpus is None

    def _loss_is_inherited(self) -> bool:
        """Whether no code of the user's computes the loss."""
        own = {name: getattr(self, name, None) for name in _LOSS_METHODS}
        own["training_step"] = self._step_of_the_loop or own["training_step"]
        inherited = all(
            getattr(method, "__func__", None) is getattr(Trainer, name, None)
            for name, method in own.items()
        )
        return inherited and self.compute_loss_func is None

    def _prediction_is_inherited(self) -> bool:
        """Whether no code of the user's makes predictions."""
        own = inherited_from(type(self), PipelineMixin, "prediction_step") is Trainer
        return own and self._loss_is_inherited()

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
        if own_step and self._steps.reads_ahead and self._evaluates_in_stages():
            assert self.plan is not None
            loss_only = self.args.prediction_loss_only
            loss_only = loss_only if prediction_loss_only is None else prediction_loss_only
            number = _AHEAD_PER_STAGE * self.plan.num_stages
            dataloader = Prefetch(
                dataloader, number, lambda batches: self._run_ahead(batches, loss_only, ignore_keys)
            )
        elif not own_step:
            self._steps.fetch()  # it may call the model itself
        try:
            with self._steps.running():
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
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """Return loss, logits and labels of one batch, nested as transformers nests them."""
        if id(inputs) not in self._ahead:
            self._run_ahead([inputs], prediction_loss_only, ignore_keys, **gen_kwargs)
        return self._ahead.pop(id(inputs))

    def _run_ahead(self, batches: list[dict[str, Any]], *args: Any, **kwargs: Any) -> None:
        """Predict batches; their results are taken one by one."""
        predict = super().prediction_step
        bodies = [partial(predict, self._whole_model, batch, *args, **kwargs) for batch in batches]
        if not self._prediction_is_inherited() and not self._generates_in_stages():
            self._steps.fetch()  # it may use the model in any way, as generate() does
        if self._evaluates_in_stages():
            found = self._steps.predict(bodies)
        else:
            self._steps.fetch()
            with calls_of(self._whole_model, self._in_one_piece):
                found = [body() for body in bodies]
        self._ahead = {id(b): result for b, result in zip(batches, found, strict=True)}

    def _generates_in_stages(self) -> bool:
        """Whether predictions are those of Seq2SeqTrainer, and the target generates for it."""
        owner = inherited_from(type(self), PipelineMixin, "prediction_step")
        known = owner is Seq2SeqTrainer and self._loss_is_inherited()
        return known and self._evaluates_in_stages() and self._steps.generates()

    def _evaluates_in_stages(self) -> bool:
        cast_model = self.args.fp16_full_eval or self.args.bf16_full_eval
        if cast_model and not self.is_in_train:  # its weights have another type for the moment
            return False
        return self._given_plan is not None or self._steps.has_executable()

    # ---- the model and its executable ---------------------------------------------------

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
        return "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "float32"

    def create_accelerator_and_postprocess(self) -> None:
        """Look at the arguments first: what cannot be done is refused before it is set up."""
        check_arguments(self.args, self._steps.target)
        self._steps.enter()
        super().create_accelerator_and_postprocess()
        self.accelerator = self._steps.adapt(self.accelerator)
        self.gather_function = self.accelerator.gather_for_metrics
        if self._precision == "fp16":
            scale_gradients(self.accelerator, self.args.device)
        backward = self.accelerator.backward
        self.accelerator.backward = lambda loss, **kwargs: backward(trainable(loss), **kwargs)

    def close(self) -> None:
        """Stop the threads of the stages, or free the IPUs; the next step starts anew."""
        self._steps.close()

    def end(self) -> None:
        """Finish the trackers and stop the threads of the stages."""
        self.close()
        super().end()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # The stages compute in their own autocast region; accelerate's would wrap forward.
        made = super()._build_accelerator_args(**{**kwargs, "mixed_precision": "no"})
        return uncompiled(made)  # the stages compile their blocks

    @property
    def _whole_model(self) -> nn.Module:
        return cast(nn.Module, self.model)

    def planned(self, part: Mapping[str, Any]) -> Plan:
        """Return the plan of the present model; it is made from one microbatch if none was given.

        Args:
            part: The microbatch.
        """
        if recomputes(self.args):  # the inherited train() switched the model's own on
            switch_off_checkpointing(self._whole_model)
        make = partial(self._make_plan, self._whole_model, part)
        self.plan = self._given_plan or self._steps.plan(make)
        logger.info("%s", self.plan.explain())
        return self.plan

    def compiled(self, plan: Plan, **options: Any) -> Any:
        """Return an executable of the present model.

        Args:
            plan: Its plan.
            **options: As for :func:`ipu_pipeline.compile`, which not all targets take.
        """
        with torch.random.fork_rng(devices=[]):
            return compiler.compile(
                self._whole_model,
                plan,
                target=self._steps.target,
                seed=self.args.seed,
                recompute="all" if recomputes(self.args) else None,
                compile_blocks=bool(self.args.torch_compile),
                **options,
            )


_PREDICTION_STEP = PipelineMixin.prediction_step
