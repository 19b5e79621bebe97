"""The local executable: drives stage threads through a schedule, then updates the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ipu_pipeline.backends.local.replicas import changes_state, stages_of_replicas, unchanged
from ipu_pipeline.backends.local.runner import (
    StageThreads,
    contested,
    run_sequentially,
    shape_to_run,
)
from ipu_pipeline.backends.local.step import Step
from ipu_pipeline.backends.local.whole_loss import WholeLossStep, whole_loss
from ipu_pipeline.capture.glue_run import Unlifted
from ipu_pipeline.capture.inputs import described
from ipu_pipeline.capture.loss_terms import LossTerms
from ipu_pipeline.capture.patches import fused_gelu
from ipu_pipeline.capture.replay import Differs
from ipu_pipeline.errors import LoweringError, StageError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.ops.linear import casts_of_one_step
from ipu_pipeline.ops.threads import available_threads, share_threads
from ipu_pipeline.planner.schedules import schedule_kind
from ipu_pipeline.planner.schedules.rows import forward_only, side_by_side
from ipu_pipeline.stages.batch import READS, BatchCutter, CutBatch, Microbatch, cut_batches
from ipu_pipeline.stages.block_runs import offloaded_blocks, recomputed_blocks
from ipu_pipeline.stages.calls import called_in_turn, check_call
from ipu_pipeline.stages.captures import StageCache
from ipu_pipeline.stages.devices import chosen_device, move
from ipu_pipeline.stages.executable import (
    EvalResult,
    Executable,
    ExecutionOptions,
    StepResult,
    join,
    mean_loss,
)
from ipu_pipeline.stages.loss_check import LossCheck
from ipu_pipeline.stages.loss_shares import LossShares, MixedSamplesError
from ipu_pipeline.stages.materialize import materialize
from ipu_pipeline.stages.stage import Stage
from ipu_pipeline.stages.tables import check_blocks, serialized
from ipu_pipeline.stages.training import (
    apply_update,
    autocast_region,
    check_model,
    in_evaluation,
    kept_modes,
    refuse_gradient_hooks,
)
from ipu_pipeline.stages.variants import Prepared


class LocalExecutable(Executable):
    """Runs a plan in this process; every stage of every replica has a thread.

    Replicas share the weights. Each adds up gradients of its own, which are added in the order of
    the replicas, so that results do not depend on timing. Where the forward passes of a model
    change what the next one reads (batch norm), replicas run one after another.

    A short microbatch is captured for its own shape and weighs less.

    ``options`` say how to run; the others are those of :class:`Executable`.

    Raises:
        LoweringError: The target cannot run the plan.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        optimizer: torch.optim.Optimizer | None,
        options: ExecutionOptions,
    ) -> None:
        check(plan, options)
        materialize(model, options.weights, options.seed)
        check_model(model, optimizer)
        super().__init__(model, plan, optimizer, options)
        self._scaler.check(model, master_weights=options.master_weights)
        self._device = chosen_device(options.device, model)
        if options.device is not None:
            move(model, optimizer, self._device)
        self._cache = StageCache(
            model,
            plan,
            options.precision,
            recompute=recomputed_blocks(options.recompute, plan),
            self_check=options.self_check,
            live=True,
            offload=offloaded_blocks(options.offload_activations, plan, self._device),
            compile_blocks=options.compile_blocks,
        )
        wish = options.loss_weights
        self._cutter = BatchCutter(model, plan.batch_axes, weighs_losses=wish is not None)
        self._shares = LossShares(model, wish, plan.granularity)
        self._check = LossCheck(self._shares)
        self._known: dict[object, MixedSamplesError | None] = {}
        self._threads: StageThreads | None = None
        self._broken: Exception | None = None
        self._closed = False

    # ---- steps --------------------------------------------------------------------------

    def train_step(self, batch: Mapping[str, Any]) -> StepResult:
        """Run one optimizer step on ``batch``.

        Args:
            batch: Tensors with axis 0 = micro batch x microbatches x replicas.

        Returns:
            The mean loss and what the update did.

        Raises:
            LoweringError: There is no optimizer, or the batch cannot be cut.
            StageError: A stage failed; no weight was changed.
        """
        self.options.require_training()
        optimizer = self.trained_optimizer()
        scaling = self._scaler.factor
        step = self._accumulate(self._split(batch), scaling)
        update = apply_update(
            optimizer,
            self.model.parameters(),
            loss_scaling=scaling,
            max_grad_norm=self.options.max_grad_norm,
            masters=self._masters,
        )
        self._scaler.update(skipped=update.skipped)
        return self.stepped(
            StepResult(
                mean_loss(step.microbatches, step.results),
                update.grad_norm,
                update.skipped,
                sum(part.num_samples for part in step.microbatches),
                tuple(step.busy_s),
            )
        )

    def forward_backward(self, batch: Mapping[str, Any]) -> float:
        """Return the mean loss; add unscaled gradients to ``.grad`` of the model's parameters.

        Raises:
            StageError: A stage failed; gradients are then incomplete.
        """
        step = self._accumulate(self._split(batch), 1.0)
        return mean_loss(step.microbatches, step.results)

    def forward_backward_parts(
        self, parts: Sequence[Mapping[str, Any]], weights: Sequence[float], first: int = 0
    ) -> list[float]:
        """Run microbatches that the caller has cut, each of its own shape.

        Args:
            parts: One batch per microbatch, at least one.
            weights: Factor of each one's loss in the sum whose gradients are added to ``.grad``.
            first: How many microbatches of this optimizer step have run before.

        Returns:
            The loss of every microbatch, not weighted.

        Raises:
            LoweringError: There is no microbatch, or not one weight for each.
            StageError: A stage failed; gradients are then incomplete.
        """
        step = self._accumulate(cut_batches(parts, weights, self._device, first), 1.0)
        return [float(result["loss"]) for result in step.results]

    def eval_step(self, batch: Mapping[str, Any]) -> EvalResult:
        """Run the model in evaluation mode, without gradients, pipelined.

        Raises:
            StageError: A stage failed.
        """
        cut = self._cutter.evaluation(batch, 2 * self.plan.num_stages)
        if len(cut.parts) > 1 and self._reads_values(cut.parts[0]):
            cut = self._cutter.whole(cut.batch, cut.found, READS)
        try:
            step = self._evaluate(cut)
        except MixedSamplesError as error:
            step = self._evaluate(self._cutter.whole(cut.batch, cut.found, str(error)))
        return join(step.microbatches, step.results, cut.found.outputs).nested()

    def eval_parts(self, parts: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
        """Evaluate batches of any shapes in one pass of the pipeline; nothing is joined.

        Raises:
            LoweringError: There is no batch.
            StageError: A stage failed.
        """
        microbatches = cut_batches(parts, [1.0] * len(parts), self._device)
        found = zip(microbatches, self._evaluate(microbatches).results, strict=True)
        return [join([part], [results], {}).nested() for part, results in found]

    def close(self) -> None:
        """Stop the stage threads; calling it again does nothing."""
        self._closed = True
        if self._threads is not None:
            self._threads.close()
            self._threads = None
        self.wait_for_checkpoint()

    # ---- running ------------------------------------------------------------------------

    def _call_model(
        self, name: str, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> list[Any]:
        """Call the model itself: its stages are on one device, and run one after another."""
        self._require_usable()
        check_call(self.model, name)
        precision = autocast_region(self.options.precision, self._device)
        with in_evaluation(self.model), torch.no_grad(), precision:
            return called_in_turn(self.model, name, calls, self._device)

    def _split(self, batch: Mapping[str, Any]) -> CutBatch:
        plan = self.plan
        number = plan.num_microbatches * plan.replicas
        return self._cutter.training(batch, number, plan.micro_batch_size)

    def _reads_values(self, part: Microbatch) -> bool:
        with in_evaluation(self.model), torch.no_grad():
            return self._cache.reads_values(part)

    def _evaluate(self, batch: CutBatch | Sequence[Microbatch]) -> Step:
        """Return the step with what each microbatch computed."""
        with in_evaluation(self.model), torch.no_grad():
            return self._in_groups(batch, 0.0, training=False)

    def _accumulate(self, batch: CutBatch | Sequence[Microbatch], loss_scaling: float) -> Step:
        """Run a training step up to the gradients; return it with its results and times."""
        self.options.require_training()
        with torch.enable_grad(), casts_of_one_step(), fused_gelu:
            return self._in_groups(batch, loss_scaling, training=True)

    def _in_groups(
        self, batch: CutBatch | Sequence[Microbatch], loss_scaling: float, *, training: bool
    ) -> Step:
        """Run microbatches, all at once if their stages may run ahead of the model's own code.

        Losses of a batch that was cut here are weighed as the loss of that batch means it.
        """
        cut = batch if isinstance(batch, CutBatch) else None
        microbatches = batch.parts if isinstance(batch, CutBatch) else batch
        if cut is not None:
            error = self._mixing(cut, training=training)
            if error is not None:
                return self._with_whole_loss(cut, loss_scaling, error)
        done: Step | None = None
        ready: list[Microbatch] = []
        terms: list[LossTerms] = []
        for group in self._cache.groups(microbatches):
            first = len(ready)
            ready += [one.microbatch for one in group]
            terms += [one.stages[-1].loss_terms for one in group]
            weighted = ready
            if cut is not None:
                weighted = self._weighted(cut, group, ready, terms, training=training)
            step = self._run_group(
                group, weighted[first : len(ready)], loss_scaling, training=training
            )
            if done is None:
                done = step
            else:
                done.join(step)
        assert done is not None
        return done

    def _mixing(self, cut: CutBatch, *, training: bool) -> MixedSamplesError | None:
        """Return why the loss is computed once for all microbatches; ``None`` if it is not.

        That is found before any glue runs. What glue keeps has no values until the stages of its
        microbatch have run, so that other shapes are captured here, too.

        Raises:
            MixedSamplesError: Microbatches cannot give the loss, and it cannot be computed so.
        """
        shapes = training, *(described(part.inputs) for part in cut.parts)
        if shapes not in self._known:
            ready, terms = self._cache.foreseen(cut.parts)
            self._known[shapes] = None
            try:
                self._check.check(cut, ready, terms, training=training)
            except MixedSamplesError as error:
                del self._known[shapes]
                once = training and self._runs_forward_first(len(cut.parts))
                if not once or self._shares.is_ordered(cut, terms[0]):
                    raise
                return error
        return self._known[shapes]

    def _weighted(
        self,
        cut: CutBatch,
        group: Sequence[Prepared],
        ready: Sequence[Microbatch],
        terms: Sequence[LossTerms],
        *,
        training: bool,
    ) -> list[Microbatch]:
        """Weigh all microbatches of a batch, of which some are ready, the last ones in a group."""
        rest = cut.parts[len(ready) :]
        every = [*terms, *map(self._cache.loss_terms, rest)]
        try:
            rest = [
                replace(part, inputs={**part.inputs, **self._cache.early_hosts(part)})
                if set(one.inputs) - part.inputs.keys()
                else part
                for part, one in zip(rest, every[len(ready) :], strict=True)
            ]
            parts = [*ready, *rest]
            self._check.check(cut, parts, every, training=training)
            return self._shares.weighted(cut, parts, every, training=training)
        except LoweringError:
            for run in (one.run for one in group if one.run is not None):
                run.close()
            raise

    def _run_group(
        self,
        group: Sequence[Prepared],
        parts: Sequence[Microbatch],
        loss_scaling: float,
        *,
        training: bool,
    ) -> Step:
        """Run microbatches; one whose glue does something else than recorded as often as it takes.

        Their gradients are added up.
        """
        number = len(parts)
        replica_of = self._replicas_of(group) if training else None
        schedule = (
            self._rows(*Counter(replica_of or [0] * number).values())
            if training
            else forward_only(self.plan.num_stages, number)
        )
        while True:
            stages, glue = stages_of_replicas(group, replica_of), group[0].run
            if glue is not None and training and self.plan.vocabulary is not None:
                glue.close()
                raise LoweringError(
                    "the code between the model's blocks waits for values that they compute, and a "
                    "loss whose vocabulary is spread over stages has none until the backward pass: "
                    "plan without vocabulary"
                )
            step = Step(
                stages, parts, self.options, self.global_step, loss_scaling, schedule,
                self._device, glue, replica_of,
            )  # fmt: skip
            try:
                self._run(step)
            except (Differs, Unlifted) as error:
                again = self._cache.again(group[0], error)
                inputs = {**parts[0].inputs, **again.microbatch.inputs}
                group, parts = [again], [replace(parts[0], inputs=inputs)]
                continue
            except BaseException:
                if glue is not None:
                    glue.close()
                raise
            if glue is not None:
                glue.close(done=True)
            step.add_shared_gradients()
            return step

    def _runs_forward_first(self, number: int) -> bool:
        """Whether all forward passes come before the first backward pass, with the loss alone."""
        simple = not serialized(self.plan) and self.plan.vocabulary is None and number > 1
        kinds = ["".join(action.kind for action in row) for row in self._rows(number).rows]
        return simple and all("F" not in row.lstrip("F") for row in kinds)

    def _with_whole_loss(
        self, cut: CutBatch, loss_scaling: float, error: MixedSamplesError
    ) -> Step:
        """Run all microbatches, and compute the loss once on what they give."""
        shapes = True, *(described(part.inputs) for part in cut.parts)
        compared = shapes not in self._known
        failure = MixedSamplesError(
            error.problem,
            "plan with microbatches=1 (it cannot be computed once for all of them, either)",
        )
        stages, parts, whole = whole_loss(self._cache, cut, failure, compared=compared)
        schedule = self._rows(len(parts))
        step = WholeLossStep(
            stages, parts, self.options, self.global_step, loss_scaling, schedule, self._device
        )
        step.whole = whole
        self._run(step)
        self._known[shapes] = error
        step.add_shared_gradients()
        return step

    def _rows(self, *microbatches: int) -> Schedule:
        """Return the schedule's rows; 1F1B's where it cannot run so few (the sums are equal).

        ``microbatches`` are those of every replica.
        """
        kind, shape = shape_to_run(self.plan, self.options)
        shapes = [replace(shape, num_microbatches=number) for number in microbatches]
        kinds = [schedule_kind("1f1b") if kind.problem(own) else kind for own in shapes]
        return side_by_side([own.rows(each) for own, each in zip(kinds, shapes, strict=True)])

    def _replicas_of(self, group: Sequence[Prepared]) -> list[int] | None:
        """Return the replica of each microbatch, ascending; None where one has to run all.

        Raises:
            LoweringError: A hook of a parameter would see a part of its gradient.
        """
        stages = [stage for one in group for stage in one.stages]
        if self.plan.replicas == 1 or self._runs_alone(stages) or changes_state(stages):
            return None
        refuse_gradient_hooks(self.model, self.model.parameters(), "replicas")
        return [part * self.plan.replicas // len(group) for part in range(len(group))]

    def _runs_alone(self, stages: Sequence[Stage]) -> bool:
        """Whether stages have to run in the caller's thread."""
        # Torch compiles in one thread at a time, and does not run what it compiles meanwhile.
        alone = self.options.sequential or self.options.compile_blocks
        return alone or any(stage.thread_bound or stage.in_order for stage in stages)

    def _require_usable(self) -> None:
        if self._closed or self._broken is not None:
            reason = f"after a failure ({self._broken})" if self._broken else "it was closed"
            raise LoweringError(f"this executable cannot run: {reason}; compile the model again")

    def _run(self, step: Step) -> None:
        self._require_usable()
        stages = [stage for own in step.stages for stage in own]
        in_order = any(stage.in_order for stage in stages)
        alone = self._runs_alone(stages) or step.glue is not None or contested(step.stages)
        alone = alone or (self.plan.num_stages == 1 and step.replica_of is None)
        try:
            with kept_modes(self.model):
                if alone:
                    run_sequentially(step.schedule, step, in_order=in_order)
                elif step.replica_of is not None:
                    with unchanged(self.model, self.plan.replicas):
                        self._run_in_threads(step)
                else:
                    self._run_in_threads(step)
        except StageError as error:
            step.clear()
            if type(error) is not StageError:  # stalled threads cannot be used again
                self._broken = error
            raise
        except (Differs, Unlifted):
            step.clear()
            raise
        except BaseException:
            step.clear()
            self._broken = StageError("the step was interrupted")
            raise

    def _run_in_threads(self, step: Step) -> None:
        if self._threads is None:
            number = self.plan.num_stages * self.plan.replicas
            self._threads = StageThreads(number, self.options.stall_timeout_s)
        self._threads.run(step.schedule, step, self._intra_op(step.schedule))

    def _intra_op(self, schedule: Schedule) -> tuple[int, ...]:
        """Share the threads of the caller among the rows by what their stages are to take."""
        seconds = [stage.forward_s + stage.backward_s for stage in self.plan.stages]
        loads = [sum(seconds[s] for s in {action.stage for action in row}) for row in schedule.rows]
        return share_threads(loads, available_threads())


def check(plan: Plan, options: ExecutionOptions) -> None:
    """Refuse what the local target cannot run.

    Raises:
        LoweringError: State divided among replicas, a spread vocabulary in several of them, a
            schedule that it does not have, unknown blocks to recompute, or a serialized block
            without parameters.
    """
    options.refuse_ipus("local")
    if options.replicated_tensor_sharding:
        raise LoweringError(
            "replicated_tensor_sharding divides optimizer state among replicas, and those of the "
            "local target share it; leave it out, or use target='distributed' with a plan of "
            "several replicas"
        )
    if plan.replicas > 1 and plan.vocabulary is not None:
        raise LoweringError(
            f"the plan spreads the vocabulary over stages and has {plan.replicas} replicas, whose "
            "gradients of its rows the local target would add in any order: plan with replicas=1, "
            "or without vocabulary"
        )
    if options.training:
        shape_to_run(plan, options)
    recomputed_blocks(options.recompute, plan)
    check_blocks(plan)
