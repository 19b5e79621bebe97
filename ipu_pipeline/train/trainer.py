"""transformers' ``Trainer`` over a pipeline: the same loop, the same files, other steps.

The inherited loop reads ``gradient_accumulation_steps`` batches per optimizer step and calls
``training_step`` for each. Here a call hands its batch in, and the last one runs them all through
the pipeline as its microbatches. So data, padding, logs, schedules, clipping and checkpoints are
the inherited ones; nothing else of the loop is replaced. What is captured of the model is what
``compute_loss`` computes with it, so label smoothing, ``compute_loss_func`` and overridden
``compute_loss`` are part of the stages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from ipu_pipeline import compiler
from ipu_pipeline.backends.local.executable import LocalExecutable
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.executable import EvalResult
from ipu_pipeline.stages.training import autocast_region
from ipu_pipeline.train.forward_view import flatten, unflatten, viewed
from ipu_pipeline.train.trainer_checks import (
    check_arguments,
    check_plan,
    check_target,
    recomputes,
    switch_off_checkpointing,
)

logger = logging.get_logger(__name__)
NUM_ITEMS = "num_items_in_batch"
# Enough for every stage to be busy most of the time, as in eval_step.
_AHEAD_PER_STAGE = 2

Prediction = tuple[Tensor | None, Any, Any]


class PipelineTrainer(Trainer):
    """A ``transformers.Trainer`` whose steps run through a pipeline in this process.

    ``gradient_accumulation_steps`` is the number of microbatches: with 1 the stages take turns.
    Until there is a plan (no training step was made, none was given), evaluation runs the model
    as it is.

    Args:
        *args: As for ``transformers.Trainer``.
        plan: A plan or its file; ``None`` makes one from the first microbatch.
        machine: As for :func:`ipu_pipeline.plan`, used where a plan is made.
        num_stages: The same.
        costs: The same. What is ``None`` is taken from our ``TrainingArguments``, if ``args`` are.
        target: ``local``; others need :func:`ipu_pipeline.train.train`.
        **kwargs: As for ``transformers.Trainer``.

    Attributes:
        plan: The plan in use; ``None`` until one is made.

    Raises:
        ValueError: An argument asks for what the pipeline cannot do.
        PlanError: The plan's file cannot be read.
    """

    def __init__(
        self,
        *args: Any,
        plan: Plan | str | Path | None = None,
        machine: str | Machine | None = None,
        num_stages: int | None = None,
        costs: str | None = None,
        target: str = "local",
        **kwargs: Any,
    ) -> None:
        check_target(target)
        self._given_plan: Plan | None = None
        self._executable: LocalExecutable | None = None
        self._parts: list[dict[str, Any]] = []
        self._ahead: dict[int, EvalResult] = {}
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
        )

    # ---- training -----------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Read the batches of the next optimizer step; nothing is left of an abandoned one."""
        self._parts = []
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
        self._parts.append(self._part(inputs, num_items_in_batch))
        if len(self._parts) < self.current_gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        parts, self._parts = self._parts, []
        weight = 1.0 if self._loss_is_whole(num_items_in_batch) else 1 / len(parts)
        with viewed(self._whole_model, self._training_view):
            executable = self._ready_executable(parts[0])
            executable.global_step = self.state.global_step
            losses = executable.forward_backward_parts(parts, [weight] * len(parts))
        return torch.tensor(sum(losses) * weight, device=self.args.device)

    def _part(self, inputs: dict[str, Any], num_items: Tensor | int | None) -> dict[str, Any]:
        part = dict(self._prepare_inputs(inputs))
        if num_items is not None:  # a tensor, so that another count is not another capture
            part[NUM_ITEMS] = torch.as_tensor(num_items)
        return part

    def _loss_is_whole(self, num_items: Tensor | int | None) -> bool:
        """Whether the microbatches' losses add up, instead of having a mean."""
        said = getattr(self, "loss_is_scaled_for_ga", None)  # newer than transformers 5.0
        if said is not None:
            return bool(said)
        counted = self.model_accepts_loss_kwargs and num_items is not None
        return counted or self.compute_loss_func is not None

    def _training_view(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        num_items = inputs.pop(NUM_ITEMS, None)
        loss = self.compute_loss(self._whole_model, inputs, num_items_in_batch=num_items)
        return {"loss": cast(Tensor, loss)}

    # ---- evaluation ---------------------------------------------------------------------

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, several batches in the pipeline at once, each with its own loss."""
        own_step = type(self).prediction_step is PipelineTrainer.prediction_step
        if own_step and self._evaluates_in_stages():
            assert self.plan is not None
            depth = _AHEAD_PER_STAGE * self.plan.num_stages
            dataloader = Prefetch(dataloader, depth, self._run_ahead)
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._ahead = {}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: FBT001 - the inherited signature
        ignore_keys: list[str] | None = None,
    ) -> Prediction:
        """Return loss, logits and labels of one batch, nested as transformers nests them."""
        if not self._evaluates_in_stages():
            found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return found[0], _in_float32(found[1]), found[2]
        result = self._ahead.pop(id(inputs), None) or self._evaluated([inputs])[0]
        loss = None if result.loss is None else torch.tensor(result.loss)
        if prediction_loss_only:
            return loss, None, None
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        members = unflatten(result.outputs)
        logits = tuple(_in_float32(v) for name, v in members.items() if name not in ignore_keys)
        return loss, logits[0] if len(logits) == 1 else logits, self._labels(inputs)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Return the region in which the model as it is, in one piece, evaluates a batch."""
        stack = super().compute_loss_context_manager()
        stack.enter_context(autocast_region("bf16" if self.args.bf16 else "float32"))
        return stack

    def _evaluates_in_stages(self) -> bool:
        cast_model = self.args.fp16_full_eval or self.args.bf16_full_eval
        if cast_model and not self.is_in_train:  # its weights have another type for the moment
            return False
        return self._given_plan is not None or self._has_executable()

    def _run_ahead(self, batches: list[dict[str, Any]]) -> None:
        results = self._evaluated(batches)
        self._ahead = {id(b): result for b, result in zip(batches, results, strict=True)}

    def _evaluated(self, batches: list[dict[str, Any]]) -> list[EvalResult]:
        counts = [
            self._get_num_items_in_batch([b], self.args.device) if self._wants_loss(b) else None
            for b in batches
        ]
        parts = [self._part(b, count) for b, count in zip(batches, counts, strict=True)]
        with viewed(self._whole_model, self._evaluation_view):
            executable = self._ready_executable(parts[0])
            executable.global_step = self.state.global_step
            return executable.eval_parts(parts)

    def _evaluation_view(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        if not self._wants_loss(inputs):
            return flatten(self._whole_model(**inputs), with_loss=False)
        num_items = inputs.pop(NUM_ITEMS, None)
        loss, outputs = self.compute_loss(
            self._whole_model, inputs, return_outputs=True, num_items_in_batch=num_items
        )
        return {"loss": loss.mean(), **flatten(outputs, with_loss=True)}

    def _wants_loss(self, inputs: Mapping[str, Any]) -> bool:
        if self.label_names:
            return all(inputs.get(name) is not None for name in self.label_names)
        asked = inputs.get("return_loss")
        return bool(self.can_return_loss if asked is None else asked)

    def _labels(self, inputs: dict[str, Any]) -> Any:
        if not self._wants_loss(inputs):
            return None
        labels = tuple(self._prepare_input(inputs.get(name)) for name in self.label_names)
        return labels[0] if len(labels) == 1 else labels

    # ---- the executable -----------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Look at the arguments first: what cannot be done is refused before it is set up."""
        check_arguments(self.args)
        super().create_accelerator_and_postprocess()

    def close(self) -> None:
        """Stop the threads of the stages; the next step starts others."""
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
        return self._executable is not None and self._executable.model is self.model

    def _ready_executable(self, part: Mapping[str, Any]) -> LocalExecutable:
        """Return the executable of the present model (``model_init`` makes new ones)."""
        if not self._has_executable():
            self.close()
            self._executable = self._compile(part)
        assert self._executable is not None
        return self._executable

    def _compile(self, part: Mapping[str, Any]) -> LocalExecutable:
        model, again = self._whole_model, recomputes(self.args)
        if again:  # the inherited train() switched the model's own recomputation on
            switch_off_checkpointing(model)
        with torch.random.fork_rng(devices=[]):
            self.plan = self._given_plan or self._make_plan(model, part)
            logger.info("%s", self.plan.explain())
            executable = compiler.compile(
                model,
                self.plan,
                precision="bf16" if self.args.bf16 else "float32",
                seed=self.args.seed,
                recompute="all" if again else None,
            )
        return cast(LocalExecutable, executable)


class Prefetch:
    """Yields a loader's batches one by one; ``run`` gets the next ``depth`` of them before.

    Everything else is the loader's own. accelerate's loaders say at the last batch that the end is
    reached, and gathering reads it: they are made to say so when that batch is handed out, not
    when it is read ahead.
    """

    def __init__(self, loader: Any, depth: int, run: Callable[[list[Any]], None]) -> None:
        self._loader = loader
        self._depth = depth
        self._run = run

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while chunk := self._next(batches):
            self._run(chunk)
            at_end = self._at_end()
            for left in range(len(chunk), 0, -1):
                if at_end:
                    self._loader.end_of_dataloader = left == 1
                yield chunk[-left]

    def _next(self, batches: Iterator[Any]) -> list[Any]:
        chunk: list[Any] = []
        for batch in batches:
            chunk.append(batch)
            # Asking for one batch more would tell accelerate that the loop is over.
            if len(chunk) == self._depth or self._at_end():
                break
        return chunk

    def _at_end(self) -> bool:
        return bool(getattr(self._loader, "end_of_dataloader", False))


def _in_float32(value: Any) -> Any:
    """Return tensors of 16 bits as float32, as accelerate hands them out of its autocast."""
    if isinstance(value, tuple):
        return tuple(_in_float32(item) for item in value)
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value
