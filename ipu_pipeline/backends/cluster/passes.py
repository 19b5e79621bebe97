"""From a batch to losses and gradients, or to outputs: the passes of one rank's stages.

Every process captures the microbatches that it is given, so that all know the same stages, and
runs its own. At the first capture it is settled which process holds what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipu_pipeline.backends.cluster.batches import Pipelines, evaluate, shared
from ipu_pipeline.backends.cluster.cut_plan import refuse_attentions, refuse_between_blocks
from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.module import StepInputs
from ipu_pipeline.backends.cluster.ranks.consistency import BatchCheck
from ipu_pipeline.backends.cluster.row_slices import row_plan
from ipu_pipeline.backends.cluster.sharding import (
    Ownership,
    OwnParameters,
    find_ownership,
    kept_aside,
    same_buffers,
    sharded,
    share_buffers,
    sum_over_ranks,
)
from ipu_pipeline.backends.cluster.shares import BatchShares
from ipu_pipeline.capture.patches import fused_gelu
from ipu_pipeline.checkpoint.slices import Slices
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ops.linear import casts_of_one_step
from ipu_pipeline.stages.batch import BatchCutter, CutBatch, Microbatch, cut_batches
from ipu_pipeline.stages.block_runs import offloaded_blocks, recomputed_blocks
from ipu_pipeline.stages.captures import StageCache
from ipu_pipeline.stages.executable import EvalResult, ExecutionOptions
from ipu_pipeline.stages.loss_shares import LossShares, MixedSamplesError
from ipu_pipeline.stages.materialize import freed_at_once
from ipu_pipeline.stages.serialize import PiecewiseLogits
from ipu_pipeline.stages.stage import Stage
from ipu_pipeline.stages.training import kept_modes
from ipu_pipeline.stages.vocabulary import whole_table


class Accumulated(NamedTuple):
    """What the forward and backward passes of a step have given.

    Attributes:
        parts: The microbatches that this process was given.
        losses: The loss of each.
        ownership: Who holds which parameter.
    """

    parts: Sequence[Microbatch]
    losses: list[float]
    ownership: Ownership

    @property
    def loss(self) -> float:
        """The weighted sum of the losses; one of weight 0 may have none (NaN)."""
        pairs = zip(self.parts, self.losses, strict=True)
        return sum(loss * part.share for part, loss in pairs if part.share)

    @property
    def num_samples(self) -> int:
        """Of all microbatches."""
        return sum(part.num_samples for part in self.parts)


class RankPasses:
    """Runs the passes of one executable's stages in this process.

    Args:
        model: Whole, or with the weights of this process's stages.
        plan: Of all processes.
        options: How to run it.
        groups: Of the processes.
        slices: What is here of tensors that several processes have a part of.
        trained: The optimizer's parameters; ``None``: nothing is trained.
        device: Where the weights are.
        holds_all: Whether every process has the whole model.

    Attributes:
        shares: What a replica is given of a batch.
        cache: The stages of every kind of microbatch.
        batch_check: Compares what processes are given.
        ownership: Who holds what; ``None`` before the first training step.
        changing: Buffers that this process's stages write to.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        options: ExecutionOptions,
        groups: Groups,
        slices: Slices,
        trained: OwnParameters | None,
        device: torch.device,
        *,
        holds_all: bool,
    ) -> None:
        self.ownership: Ownership | None = None
        self.changing: list[Tensor] = []
        self._model, self._plan, self._options = model, plan, options
        self._groups, self._slices, self._trained = groups, slices, trained
        self._holds_all = holds_all
        self._rows = row_plan(plan, groups.layout.positions)
        self._pipelines = Pipelines(options.schedule or plan.schedule, groups)
        self.cache = StageCache(
            model,
            plan,
            options.precision,
            recompute=recomputed_blocks(options.recompute, plan),
            # Stand-ins tell nothing about gradients.
            self_check=options.self_check and holds_all,
            on_drop=self._pipelines.drop,
            offload=offloaded_blocks(options.offload_activations, plan, device),
            compile_blocks=options.compile_blocks,
        )
        wish = options.loss_weights
        self._cutter = BatchCutter(model, plan.batch_axes, weighs_losses=wish is not None)
        losses = LossShares(model, wish, plan.granularity)
        self.shares = BatchShares(plan, groups, self._cutter, self.cache, losses, options.batches)
        self.batch_check = BatchCheck(groups, apart=self.shares.apart)

    # ---- training -----------------------------------------------------------------------

    def cut(self, batch: Mapping[str, Any], step: int) -> CutBatch:
        """Return a training batch as microbatches, after the processes have compared it."""
        self.batch_check.check("training", step, batch)
        with self._looking():
            return self.shares.cut(batch)

    def given(
        self, parts: Sequence[Mapping[str, Any]], weights: Sequence[float], first: int, step: int
    ) -> Sequence[Microbatch]:
        """Return microbatches that the caller has cut."""
        self.batch_check.check("training", step, *parts)
        none = self.shares.apart and not parts
        cut = [] if none else cut_batches(parts, weights, self._groups.device)
        return self.shares.numbered(cut, first)

    def accumulate(
        self,
        cut: CutBatch | Sequence[Microbatch],
        step: int,
        loss_scaling: float = 1.0,
        *,
        for_update: bool = False,
    ) -> Accumulated:
        """Add the gradients of microbatches to ``.grad`` of this process's own parameters.

        Args:
            cut: From :meth:`cut` or :meth:`given`.
            step: Of training; random numbers are keyed by it.
            loss_scaling: Factor of the loss before the backward pass.
            for_update: Whether each gradient is needed by the process that updates it only.
        """
        groups = self._groups
        with torch.enable_grad(), casts_of_one_step(), fused_gelu:
            stages, parts = self._prepared(cut, step, training=True)
            ownership = self._settled(stages[0]) if stages else self.known_ownership()
            self.share_buffers()
            buffers = same_buffers(self._model, self.changing)
            with kept_aside(ownership.held(self._model)), buffers, kept_modes(self._model):
                pairs = self.shares.own(list(zip(parts, stages, strict=True)))
                own = self._pipelines.run(pairs, self._inputs(step), loss_scaling)
                with groups.waiter.activity.during("summing gradients"):
                    sum_over_ranks(
                        self._model, ownership, groups, for_update=for_update, slices=self._slices
                    )
        found = [own.get(part.index, 0.0) for part in parts]
        if not self.shares.apart and self._slices.index:
            found = [0.0] * len(found)  # ranks that share products all have the same loss
        group = groups.pipeline if self.shares.apart else None
        return Accumulated(parts, groups.sum_numbers(found, group), ownership)

    # ---- evaluation ---------------------------------------------------------------------

    def evaluate(self, batch: Mapping[str, Any], step: int) -> EvalResult:
        """Run a batch forward; a loss that mixes samples keeps it whole."""
        self.batch_check.check("evaluation", step, batch)
        self.share_buffers()
        with self._looking():
            cut = self._cutter.evaluation(batch, 2 * self._plan.num_stages)
        try:
            stages, parts = self._prepared(cut, step, training=False)
        except MixedSamplesError as error:
            cut = self._cutter.whole(cut.batch, cut.found, str(error))
            stages, parts = self._prepared(cut, step, training=False)
        results = evaluate(stages, self._inputs(step, parts), self._groups)
        return shared(parts, results, self._groups, cut.found.outputs, stages[0][0].order)

    def evaluate_parts(self, parts: Sequence[Mapping[str, Any]], step: int) -> list[EvalResult]:
        """Run batches of any shapes forward in one pass of the pipeline."""
        self.batch_check.check("evaluation", step, *parts)
        self.share_buffers()
        cut = cut_batches(parts, [1.0] * len(parts), self._groups.device)
        stages, ready = self._prepared(cut, step, training=False)
        results = evaluate(stages, self._inputs(step, ready), self._groups)
        return [
            shared([part], [found], self._groups, {}, own[0].order)
            for part, found, own in zip(ready, results, stages, strict=True)
        ]

    # ---- stages -------------------------------------------------------------------------

    def _looking(self) -> contextlib.AbstractContextManager[Any]:
        """Return the region in which the whole model may run: captures, losses, axes."""
        region = contextlib.ExitStack()
        if not self._holds_all:
            region.enter_context(freed_at_once())
        region.enter_context(self._slices.whole_stand_ins())
        if self._rows is not None:
            region.enter_context(PiecewiseLogits(whole_table(self._model, self._plan)))
        return region

    def _prepared(
        self, cut: CutBatch | Sequence[Microbatch], step: int, *, training: bool
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
            with self.shares.noting_draws():
                stages, prepared = self.cache.prepare(given)
            for own in {id(own): own for own in stages}.values():
                refuse_between_blocks(own, self._slices)
            if any(stage.in_order for own in stages for stage in own):
                self._refuse_other_order(len(prepared))
            self.batch_check.check_glue(step, given, prepared, stages)
            if not isinstance(cut, CutBatch):
                if training:
                    self.shares.check_parts(given)
                return stages, prepared
            return stages, self.shares.weighted(cut, prepared, stages, training=training)

    def _refuse_other_order(self, num_microbatches: int) -> None:
        plan = self._plan
        schedule = self._options.schedule or plan.schedule
        one = plan.num_stages == plan.replicas == 1
        if not one or (schedule != "1f1b" and num_microbatches > 1):
            raise LoweringError(
                f"blocks of {type(self._model).__name__} draw from generators of Python or numpy, "
                "or read what the backward pass changes, so that a microbatch must end before the "
                "next one begins; processes run several at a time: draw with torch, whose numbers "
                "do not depend on the split, use target='local', or one stage and schedule='1f1b'"
            )

    def _inputs(self, step: int, parts: Sequence[Microbatch] = ()) -> StepInputs:
        options, device = self._options, self._groups.device
        return StepInputs(parts, options.seed, step, options.precision, device=device)

    # ---- who holds what -----------------------------------------------------------------

    def known_ownership(self) -> Ownership:
        """Return who holds what.

        Raises:
            LoweringError: No training step has run.
        """
        if self.ownership is None:
            raise LoweringError(
                "which process has which gradients is known after the first forward and backward "
                "pass; run one before"
            )
        return self.ownership

    def _settled(self, stages: tuple[Stage, ...]) -> Ownership:
        """Find out who holds what, at the first capture; it does not depend on the shape."""
        if self.ownership is None:
            groups, layout = self._groups, self._groups.layout
            named = dict(self._model.named_parameters(remove_duplicate=False))
            found = find_ownership(stages, layout, self._rows, named)
            own = [p for index in layout.own_stages for p in stages[index].programs]
            changing = {id(t): t for program in own for t in program.changing.values()}
            self.changing = [t for t in changing.values() if not isinstance(t, nn.Parameter)]
            groups.make_holders(sorted({s for s in found.holders.values() if len(s) > 1}))
            if self._trained is not None:
                if self._options.replicated_tensor_sharding and layout.num_replicas > 1:
                    parameters = list(self._model.parameters())
                    trains = self._trained.trains
                    found = sharded(found, parameters, layout.num_replicas, trains, self._slices)
                self._trained.keep(found)
            self.ownership = found
        return self.ownership

    def share_buffers(self) -> None:
        """Give every process the buffers that stages of another one have written to."""
        share_buffers(self.changing, self._groups)

    def close(self) -> None:
        """Forget the pipelines, whose messages hold the groups."""
        self._pipelines.clear()
