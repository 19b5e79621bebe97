"""The distributed executable: this process's part of a plan that many processes run."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from ipu_pipeline.backends.cluster.batches import Pipelines, evaluate, shared
from ipu_pipeline.backends.cluster.checkpoints import ShardedCheckpoints, collect_weights
from ipu_pipeline.backends.cluster.cut_plan import (
    refuse_attentions,
    refuse_between_blocks,
    refuse_whole_tensors,
)
from ipu_pipeline.backends.cluster.inference import (
    agreed,
    call_on_ranks,
    check_same_tokens,
    refuse,
)
from ipu_pipeline.backends.cluster.joining import Joining, read_own_weights, slices_of
from ipu_pipeline.backends.cluster.module import StepInputs
from ipu_pipeline.backends.cluster.ranks.consistency import BatchCheck
from ipu_pipeline.backends.cluster.row_slices import RowSlices, row_plan
from ipu_pipeline.backends.cluster.sharding import (
    Ownership,
    OwnParameters,
    collect_states,
    find_ownership,
    grad_norm,
    keep_own_states,
    kept_aside,
    same_buffers,
    sharded,
    share_buffers,
    sum_over_ranks,
    update,
)
from ipu_pipeline.backends.cluster.shares import BatchShares
from ipu_pipeline.backends.cluster.vocabulary import SpreadVocabulary
from ipu_pipeline.capture.named_ids import naming_ids
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ops.linear import casts_of_one_step
from ipu_pipeline.stages.batch import BatchCutter, CutBatch, Microbatch, cut_batches
from ipu_pipeline.stages.block_runs import offloaded_blocks, recomputed_blocks
from ipu_pipeline.stages.calls import check_call
from ipu_pipeline.stages.captures import StageCache
from ipu_pipeline.stages.devices import chosen_device, move
from ipu_pipeline.stages.executable import EvalResult, Executable, ExecutionOptions, StepResult, T
from ipu_pipeline.stages.loss_shares import LossShares, MixedSamplesError
from ipu_pipeline.stages.materialize import freed_at_once, is_on_meta
from ipu_pipeline.stages.serialize import PiecewiseLogits
from ipu_pipeline.stages.stage import Stage
from ipu_pipeline.stages.training import in_evaluation, kept_modes
from ipu_pipeline.stages.vocabulary import whole_table


class DistributedExecutable(Executable):
    """Runs this process's stages of a plan. Every process calls every method, in one order.

    A short microbatch is a run of its own and weighs less. Of a model on ``meta``, this process
    has the weights of its own stages only, and what is done with all of them is refused.

    ``optimizer`` is cut down to the parameters of this process; ``options`` say how to run.

    Raises:
        LoweringError: The processes cannot run the plan, or do not agree on what to run; the
            same on all of them.
        StageError: One of them failed or ended.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        optimizer: torch.optim.Optimizer | None,
        options: ExecutionOptions,
    ) -> None:
        super().__init__(model, plan, optimizer, options)
        device = chosen_device(options.device, model, by_local_rank=True)
        self._holds_all = not is_on_meta(model)
        self._job = Joining(model, plan, optimizer, options, device, self._scaler).join()
        self.groups, self._watchdog = self._job.groups, self._job.watchdog
        self._own = None if optimizer is None else OwnParameters(optimizer)
        self._slices, self._cuts = slices_of(model, plan, optimizer, self.groups)
        held = read_own_weights(model, plan, options, self.groups, self._slices)
        self._slices.install()
        if options.device is not None:
            move(model, optimizer, device)
        self._rows = row_plan(plan, self.groups.layout.positions)
        if self._rows is not None:
            assert isinstance(self._slices, RowSlices)
            self.groups.vocabulary = SpreadVocabulary(
                model, self._rows, self._slices, self.groups, self._watchdog.leave_with
            )
        self._checkpoints = ShardedCheckpoints(
            model,
            self._own,
            self.groups,
            self._job.background,
            self._slices,
            None if self._holds_all else held.__contains__,
            self._masters,
        )
        self._known_optimizer = optimizer
        self._ownership: Ownership | None = None
        self._changing: list[Tensor] = []
        self._pipelines = Pipelines(options.schedule or plan.schedule, self.groups)
        self._cache = StageCache(
            model,
            plan,
            options.precision,
            recompute=recomputed_blocks(options.recompute, plan),
            # Stand-ins tell nothing about gradients.
            self_check=options.self_check and self._holds_all,
            on_drop=self._pipelines.drop,
            offload=offloaded_blocks(options.offload_activations, plan, device),
            compile_blocks=options.compile_blocks,
        )
        wish = options.loss_weights
        self._cutter = BatchCutter(model, plan.batch_axes, weighs_losses=wish is not None)
        losses = LossShares(model, wish, plan.granularity)
        self._shares = BatchShares(
            plan, self.groups, self._cutter, self._cache, losses, options.batches
        )
        self._batch_check = BatchCheck(self.groups, apart=self._shares.apart)
        self._closed = False

    # ---- steps --------------------------------------------------------------------------

    def train_step(self, batch: Mapping[str, Any]) -> StepResult:
        """Run one optimizer step; every process gets the same result.

        Args:
            batch: The whole batch, the same on every process; with ``batches="share"`` that of
                this process's replica (:meth:`share_of`).

        Raises:
            LoweringError: There is no optimizer, or the batch cannot be shared out.
            StageError: This process or another one failed.
        """
        self.options.require_training()
        optimizer = self.trained_optimizer()
        with self._running("a training step"):
            scaling = self._scaler.factor
            cut = self._training_parts(batch)
            parts, losses, ownership = self._accumulate(cut, scaling, for_update=True)
            own = ownership.held(self.model)
            with self._watchdog.activity.during("the optimizer step"):
                done = update(
                    optimizer,
                    own,
                    ownership,
                    self.groups,
                    loss_scaling=scaling,
                    max_grad_norm=self.options.max_grad_norm,
                    masters=self._masters,
                    slices=self._slices,
                )
            self._scaler.update(skipped=done.skipped)
            own_samples = sum(part.num_samples for part in parts)
            loss, samples = self._shares.total([_weighted(parts, losses), own_samples])
        return self.stepped(StepResult(loss, done.grad_norm, done.skipped, int(samples)))

    def forward_backward(self, batch: Mapping[str, Any]) -> float:
        """Return the mean loss; add gradients to ``.grad`` of this process's own parameters.

        Raises:
            StageError: This process or another one failed; gradients are then incomplete.
        """
        self.options.require_training()
        with self._running("a forward and backward pass"):
            cut = self._training_parts(batch)
            own = _weighted(*self._accumulate(cut, 1.0, for_update=False)[:2])
            return self._shares.total([own])[0]

    def forward_backward_parts(
        self, parts: Sequence[Mapping[str, Any]], weights: Sequence[float], first: int = 0
    ) -> list[float]:
        """Run microbatches that the caller has cut, each of its own shape.

        Args:
            parts: One batch per microbatch, at least one; the same on every process. With
                ``batches="share"``: those of this process's replica; with them, those of the
                other replicas alternate in the batch.
            weights: Factor of each one's loss in the sum whose gradients are added to ``.grad``
                of this process's own parameters.
            first: How many microbatches of this optimizer step have run before.

        Returns:
            The loss of every microbatch, not weighted.

        Raises:
            LoweringError: There is no microbatch, or not one weight for each.
            StageError: This process or another one failed; gradients are then incomplete.
        """
        self.options.require_training()
        with self._running("a forward and backward pass"):
            self._batch_check.check("training", self.global_step, *parts)
            none = self._shares.apart and not parts
            cut = [] if none else cut_batches(parts, weights, self.groups.device)
            cut = self._shares.numbered(cut, first)
            return self._accumulate(cut, 1.0, for_update=False)[1]

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Return sums of what each replica has counted of its share of the batches."""
        with self._running("adding up what the replicas have"):
            return self._shares.total(numbers)

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Clip gradients as ``torch.nn.utils.clip_grad_norm_``; return their norm over all ranks.

        Every process passes the same parameters of the model.
        """
        with self._running("clipping gradients"):
            own = [p for p in parameters if p.grad is not None]
            norm = grad_norm(own, self._known_ownership(), self.groups, self._slices)
            clip_grads_with_norm_(own, max_norm, norm)
        return norm

    def share_of(self, num_samples: int) -> slice:
        """Return which samples of a batch this process passes to a training step."""
        return self._shares.of(num_samples)

    def eval_step(self, batch: Mapping[str, Any]) -> EvalResult:
        """Run the model in evaluation mode, without gradients; every process gets the result.

        With ``batches="share"`` replicas may be given batches of their own: each gets its own
        result.

        Raises:
            StageError: This process or another one failed.
        """
        with self._running("evaluation"), in_evaluation(self.model), torch.no_grad():
            self._batch_check.check("evaluation", self.global_step, batch)
            share_buffers(self._changing, self.groups)
            with self._looking():
                cut = self._cutter.evaluation(batch, 2 * self.plan.num_stages)
            try:
                stages, parts = self._prepared(cut, training=False)
            except MixedSamplesError as error:
                cut = self._cutter.whole(cut.batch, cut.found, str(error))
                stages, parts = self._prepared(cut, training=False)
            results = evaluate(stages, self._inputs(parts), self.groups)
            return shared(parts, results, self.groups, cut.found.outputs, stages[0][0].order)

    def eval_parts(self, parts: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
        """Evaluate batches of any shapes in one pass of the pipeline; every process gets all.

        Raises:
            LoweringError: There is no batch.
            StageError: This process or another one failed.
        """
        with self._running("evaluation"), in_evaluation(self.model), torch.no_grad():
            self._batch_check.check("evaluation", self.global_step, *parts)
            share_buffers(self._changing, self.groups)
            cut = cut_batches(parts, [1.0] * len(parts), self.groups.device)
            stages, ready = self._prepared(cut, training=False)
            results = evaluate(stages, self._inputs(ready), self.groups)
            return [
                shared([part], [found], self.groups, {}, own[0].order)
                for part, found, own in zip(ready, results, stages, strict=True)
            ]

    def _call_model(
        self, name: str, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> list[Any]:
        """Run the model's own code on every rank; see :mod:`.placed`."""
        check_call(self.model, name)
        refuse(self.plan, self.options, self.groups.layout, [given for _, given in calls])
        what = "generation" if name == "generate" else "a forward pass"
        with self._running(what), in_evaluation(self.model), torch.no_grad():
            named = [{**{str(n): arg for n, arg in enumerate(a)}, **k} for a, k in calls]
            self._batch_check.check(what, self.global_step, *named)
            share_buffers(self._changing, self.groups)
            changing = agreed(self.model, self._changing, self.groups)
            results = call_on_ranks(self.model, self.plan, self.groups, changing, name, calls)
            if name == "generate":
                check_same_tokens(results, self.groups)
            return results

    # ---- state --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Return the unsplit model's own state dict, whole on every process.

        Raises:
            LoweringError: No process has the whole model, as it came from ``meta``.
        """
        if not self._holds_all:
            raise LoweringError(
                "each process has the weights of its own stages only; save_checkpoint(folder) "
                "writes the whole model, which from_pretrained(folder) reads"
            )
        self._collect_weights()
        with self._running("joining slices"):
            return self._slices.state_dict(self.model)

    def _collect_weights(self) -> None:
        if self._ownership is not None:
            with self._running("collecting weights"):
                share_buffers(self._changing, self.groups)
                collect_weights(self.model, self._ownership, self.groups)

    def make_whole(self, optimizer: torch.optim.Optimizer | None, *, stale: bool) -> None:
        """Put all of every weight into the model, for its owner to read; whole, not slices.

        Args:
            optimizer: One of the caller's, whose states of slices become whole, too.
            stale: Whether weights were changed since the last time.
        """
        if stale:
            self._collect_weights()
        with self._running("joining slices"):
            self._slices.undo(optimizer, gather=True)

    def make_ready(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Undo :meth:`make_whole`, which any step wants; nothing is done where nothing is cut.

        Raises:
            LoweringError: The optimizer needs whole weights.
        """
        if not self._slices.cuts:
            return
        if optimizer is not None and optimizer is not self._known_optimizer:
            if self._rows is None:
                refuse_whole_tensors(optimizer, self._cuts)
            self._known_optimizer = optimizer
        self._slices.cut(optimizer)
        self._slices.install()

    def collect_optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the first process the state of all parameters in an optimizer of the caller's.

        Of weights that are cut it is collected after :meth:`make_whole`.
        """
        with self._running("collecting the optimizer's state"):
            if self._ownership is not None:
                collect_states(optimizer, self._ownership, self.groups)

    def keep_own_optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop what an optimizer of the caller's keeps of parameters that are updated elsewhere."""
        keep_own_states(optimizer, self._known_ownership())

    def save_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> Path:
        """Write one checkpoint of the whole model; every rank writes what it owns.

        Arguments and errors are those of :class:`Executable`; of ``path``, ``extra`` and
        ``attach`` the first rank's count.
        """
        with self._running("saving a checkpoint"):
            scaling, step = self._scaler.state(), self.global_step
            return self._checkpoints.save(path, self._ownership, step, scaling, *args, **options)

    def broadcast(self, value: T) -> T:
        """Return what the first process has passed, as a copy."""
        with self._running("a broadcast"):
            first: T = self.groups.ranks.gather(value)[0]
        return first

    def wait_for_checkpoint(self) -> None:
        """Wait until every checkpoint is written."""
        self._raise_error_of_last_save()
        with self._running("waiting for a checkpoint"):
            self._checkpoints.wait()

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Restore a checkpoint of any split or target, readable by all ranks; return ``extra``."""
        self._raise_error_of_last_save()
        with self._running("loading a checkpoint"):
            info = self._checkpoints.load(path, self._ownership)
            self.global_step = info.global_step
            self._scaler.load(info.loss_scaling)
        return info.extra

    def close(self, *, wait: bool = True) -> None:
        """Leave together with the other processes; calling it again does nothing.

        ``wait=False`` is for a process that ends: whoever still needs it then fails at once.
        """
        if self._closed:
            return
        self._closed = True
        error = self._error_of_last_save()
        whole = False
        if self._watchdog.failure is None and wait:
            with contextlib.suppress(RuntimeError):  # whoever fails now is no longer needed
                self.groups.ranks.gather(None)
                whole = self._holds_all
        try:
            self._slices.undo(self.optimizer, gather=whole)
        except RuntimeError:  # one of those that share them is gone
            self._slices.undo(self.optimizer, gather=False)
        if self.groups.vocabulary is not None:
            self.groups.vocabulary.close(wait=self._watchdog.failure is None)
        self._watchdog.close()
        self._pipelines.clear()
        if self._watchdog.failure is None:
            self.groups.close()
            self._job.leave()
            # Threads of a group that is still referenced at exit abort the process now and then.
            gc.collect()
        if error is not None:
            raise error

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Close the executable; the others are told of the caller's error."""
        if error is not None:
            self._error_of_last_save()  # logged; the caller's own error goes on
            self._watchdog.leave_with(error)
        self.close()

    def _raise_error_of_last_save(self) -> None:
        """Raise it before the watchdog may: the others have left with the same error."""
        error = self._error_of_last_save()
        if error is not None:
            raise error

    def _error_of_last_save(self) -> Exception | None:
        """Wait for the last checkpoint; return the error that all ranks have with it."""
        try:
            self._checkpoints.wait()
        except Exception as error:
            return error if getattr(error, "raised_on_all_ranks", False) else None
        return None

    # ---- running ------------------------------------------------------------------------

    @contextlib.contextmanager
    def _running(self, what: str) -> Iterator[None]:
        if self._closed:
            raise LoweringError("this executable was closed; compile the model again")
        with self._watchdog.guarding(what, self.global_step), naming_ids(self.model):
            yield

    def _looking(self) -> contextlib.AbstractContextManager[Any]:
        """Return the region in which the whole model may run: captures, losses, axes."""
        region = contextlib.ExitStack()
        if not self._holds_all:
            region.enter_context(freed_at_once())
        region.enter_context(self._slices.whole_stand_ins())
        if self._rows is not None:
            region.enter_context(PiecewiseLogits(whole_table(self.model, self.plan)))
        return region

    def _training_parts(self, batch: Mapping[str, Any]) -> CutBatch:
        self._batch_check.check("training", self.global_step, batch)
        with self._looking():
            return self._shares.cut(batch)

    def _accumulate(
        self, cut: CutBatch | Sequence[Microbatch], loss_scaling: float, *, for_update: bool
    ) -> tuple[list[Microbatch], list[float], Ownership]:
        """Return the microbatches, the loss of each, and who owns what."""
        with torch.enable_grad(), casts_of_one_step():
            stages, parts = self._prepared(cut, training=True)
            ownership = self._settle_ownership(stages[0]) if stages else self._known_ownership()
            share_buffers(self._changing, self.groups)
            buffers = same_buffers(self.model, self._changing)
            with kept_aside(ownership.held(self.model)), buffers, kept_modes(self.model):
                pairs = self._shares.own(list(zip(parts, stages, strict=True)))
                own = self._pipelines.run(pairs, self._inputs(), loss_scaling)
                with self._watchdog.activity.during("summing gradients"):
                    sum_over_ranks(
                        self.model,
                        ownership,
                        self.groups,
                        for_update=for_update,
                        slices=self._slices,
                    )
        found = [own.get(part.index, 0.0) for part in parts]
        if not self._shares.apart and self._slices.index:
            found = [0.0] * len(found)  # ranks that share products all have the same loss
        group = self.groups.pipeline if self._shares.apart else None
        return parts, self.groups.sum_numbers(found, group), ownership

    def _prepared(
        self, cut: CutBatch | Sequence[Microbatch], *, training: bool
    ) -> tuple[list[tuple[Stage, ...]], list[Microbatch]]:
        """Run the model's glue for all microbatches that were given, also of other replicas.

        Those of a batch that was cut here are weighed as its loss means it.

        What Python counts and draws is then the same on all ranks; and what cannot be captured is
        refused by all of them, so that nobody waits for the one that does.
        """
        with self._looking():
            given = cut.parts if isinstance(cut, CutBatch) else cut
            if self._slices.size > 1:
                refuse_attentions(any(p.inputs.get("output_attentions") for p in given))
            with self._shares.noting_draws():
                stages, prepared = self._cache.prepare(given)
            for own in {id(own): own for own in stages}.values():
                refuse_between_blocks(own, self._slices)
            if any(stage.in_order for own in stages for stage in own):
                self._refuse_other_order(len(prepared))
            self._batch_check.check_glue(self.global_step, given, prepared, stages)
            if not isinstance(cut, CutBatch):
                if training:
                    self._shares.check_parts(given)
                return stages, prepared
            return stages, self._shares.weighted(cut, prepared, stages, training=training)

    def _refuse_other_order(self, num_microbatches: int) -> None:
        one = self.plan.num_stages == self.plan.replicas == 1
        if not one or (
            (self.options.schedule or self.plan.schedule) != "1f1b" and num_microbatches > 1
        ):
            raise LoweringError(
                f"blocks of {type(self.model).__name__} draw from generators of Python or numpy, "
                "or read what the backward pass changes, so that a microbatch must end before the "
                "next one begins; processes run several at a time: draw with torch, whose numbers "
                "do not depend on the split, use target='local', or one stage and schedule='1f1b'"
            )

    def _inputs(self, parts: Sequence[Microbatch] = ()) -> StepInputs:
        options, device = self.options, self.groups.device
        return StepInputs(parts, options.seed, self.global_step, options.precision, device=device)

    def _known_ownership(self) -> Ownership:
        if self._ownership is None:
            raise LoweringError(
                "which process has which gradients is known after the first forward and backward "
                "pass; run one before"
            )
        return self._ownership

    def _settle_ownership(self, stages: tuple[Stage, ...]) -> Ownership:
        """Find out who holds what, at the first capture; it does not depend on the shape."""
        if self._ownership is None:
            layout = self.groups.layout
            named = dict(self.model.named_parameters(remove_duplicate=False))
            found = find_ownership(stages, layout, self._rows, named)
            own = [p for index in layout.own_stages for p in stages[index].programs]
            changing = {id(t): t for program in own for t in program.changing.values()}
            self._changing = [t for t in changing.values() if not isinstance(t, nn.Parameter)]
            self.groups.make_holders(sorted({s for s in found.holders.values() if len(s) > 1}))
            if self._own is not None:
                if self.options.replicated_tensor_sharding and layout.num_replicas > 1:
                    parameters = list(self.model.parameters())
                    found = sharded(
                        found, parameters, layout.num_replicas, self._own.trains, self._slices
                    )
                self._own.keep(found)
            self._ownership = found
        return self._ownership


def _weighted(parts: Sequence[Microbatch], losses: Sequence[float]) -> float:
    """Return the weighted sum of the losses; one of weight 0 may have none (NaN)."""
    pairs = zip(parts, losses, strict=True)
    return sum(loss * part.share for part, loss in pairs if part.share)
