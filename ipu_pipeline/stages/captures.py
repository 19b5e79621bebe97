"""Captures made on demand: for every batch shape, and for what Python does between the blocks."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from ipu_pipeline.capture.captured import CapturedModel, capture, take_kept
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.glue_run import GlueRun, Unlifted
from ipu_pipeline.capture.inputs import described
from ipu_pipeline.capture.loss_terms import LossTerms
from ipu_pipeline.capture.loss_walk import factored, with_counted
from ipu_pipeline.capture.patches import tracing_patches
from ipu_pipeline.capture.python_state import PythonState
from ipu_pipeline.capture.replay import Differs, Followed
from ipu_pipeline.capture.sizes import Sized
from ipu_pipeline.errors import CaptureError, PlanError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.verify import verify_state
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.build import build_stages, place_blocks
from ipu_pipeline.stages.devices import device_of
from ipu_pipeline.stages.stage import Stage
from ipu_pipeline.stages.tables import TableUses, find_tables, serialized, shard_tables
from ipu_pipeline.stages.training import autocast_region, refuse_gradient_hooks
from ipu_pipeline.stages.variants import (
    Attempt,
    LRUCache,
    Prepared,
    ShapeVariant,
    ShapeVariants,
    Signature,
    StagedProgram,
)
from ipu_pipeline.stages.vocabulary import spread_table

# A step needs two shapes (full and short microbatches), training and evaluation alternate.
MAX_SHAPES = 16
logger = logging.getLogger(__name__)


def _refuse_hooks(model: nn.Module, found: Iterable[Prepared]) -> None:
    if torch.is_grad_enabled():
        stages = {id(stage): stage for one in found for stage in one.stages}
        refuse_gradient_hooks(model, [p for s in stages.values() for p in s.shared])


@dataclass(eq=False)
class StageCache:
    """Builds the stages of a plan for the shape of a microbatch, and remembers the last few.

    Args:
        model: The user's model.
        plan: Says which block belongs to which stage.
        precision: Of the steps; captures are made in the same autocast region.
        recompute: Names of the blocks to recompute in the backward pass.
        self_check: Compare every capture with the model before trusting it.
        max_shapes: So many shapes are remembered, those of training and evaluation together, and
            of each as many captures.
        on_drop: Called with stages that are forgotten.
        live: Microbatches come from :meth:`groups`, and stages may share values with the glue.
        offload: Names of the blocks that keep their activations in host memory.
        compile_blocks: Whether blocks go through ``torch.compile``.
    """

    model: nn.Module
    plan: Plan
    precision: str
    _: KW_ONLY
    recompute: frozenset[str]
    self_check: bool
    max_shapes: int = MAX_SHAPES
    on_drop: Callable[[tuple[Stage, ...]], object] = lambda _: None
    live: bool = False
    offload: frozenset[str] = frozenset()
    compile_blocks: bool = False

    def __post_init__(self) -> None:
        self._shapes = LRUCache[Signature, ShapeVariants](self.max_shapes, self._dropped)
        self._warned: set[str] = set()
        self._modules: list[nn.Module] = []
        self._training: Signature = ()
        self._replaced: list[tuple[Stage, ...]] = []
        self._apart: dict[tuple[int, int], tuple[CapturedModel, tuple[Stage, ...]]] = {}
        self._spare: list[StagedProgram] = []  # of no remembered shape, but perhaps of one to come
        self.captures = 0

    def prepare(
        self, microbatches: Iterable[Microbatch]
    ) -> tuple[list[tuple[Stage, ...]], list[Microbatch]]:
        """Run the model's glue for every microbatch, and find the stages that do the same.

        With gradients switched on they are those of a training step. What the glue does in Python
        happens once for every microbatch, as in plain torch.

        Returns:
            The stages of every microbatch, and the microbatches with the numbers that the glue
            gave in Python.

        Raises:
            CaptureError: The model cannot be captured with these inputs.
            LoweringError: A block that the plan serializes has no table for so many slices; or
                in training, a hook on a gradient cannot run as in plain torch.
            PlanError: In training mode, its blocks are not those of the plan; or stages share what
                a forward pass changes.
        """
        found = []
        with self._replaying():
            for part in microbatches:
                found.append(self._followed(Attempt(part, self._variants(part))))
        _refuse_hooks(self.model, found)
        return [one.stages for one in found], [one.microbatch for one in found]

    def groups(self, microbatches: Sequence[Microbatch]) -> Iterator[list[Prepared]]:
        """Yield as :meth:`prepare` what may run at the same time, in order.

        A microbatch whose stages share values with its glue is alone; it must have run when the
        next group is asked for.

        Raises:
            CaptureError: As :meth:`prepare`, also the other errors.
        """
        left = list(microbatches)
        while left:
            plain: list[Prepared] = []
            with self._replaying():
                while left and (not plain or plain[-1].run is None):
                    part = left.pop(0)
                    plain.append(self._begun(Attempt(part, self._variants(part))))
            _refuse_hooks(self.model, plain)
            alone = [plain.pop()] if plain[-1].run is not None else []
            yield from (group for group in (plain, alone) if group)

    def again(self, prepared: Prepared, error: Differs | Unlifted) -> Prepared:
        """Begin a microbatch anew, after its glue has done something else than recorded."""
        assert prepared.run is not None
        prepared.run.close()
        attempt = prepared.attempt
        attempt.restore()
        with self._replaying():
            if isinstance(error, Unlifted):
                self._lift(attempt.tried[-1], error)
                attempt.tried.pop()
            else:
                attempt.reason = attempt.reason or error
            found = self._begun(attempt)
        _refuse_hooks(self.model, [found])
        return found

    def loss_terms(self, part: Microbatch) -> LossTerms:
        """Return what the loss of a microbatch is made of, as far as its shape tells."""
        with self._replaying():
            variants = self._variants(part)
            if not variants.found:
                variants.found.extend(self._kept(part.inputs))
            if not variants.found:
                found = self._at_other_sizes(part.inputs, self._python_state())
                variants.found.append(found or self._captured(part.inputs))
        return variants.found[0].stages[-1].loss_terms

    def at_size(self, part: Microbatch) -> tuple[CapturedModel, dict[str, Any]] | None:
        """Return a known program at the sizes of ``part``, and its host values.

        Nothing is captured for it, and what its glue does in Python is undone.
        """
        with self._replaying():
            before, variants = self._python_state(), self._variants(part)
            if not variants.found:
                sized = self._at_other_sizes(part.inputs, before)
                variants.found.extend([] if sized is None else [sized])
            if not variants.found or any(c.is_late for c in variants.found[0].captured.glue.calls):
                return None
            variant = variants.found[0]
            try:
                followed = variant.captured.follow(part.inputs, variants.integers)
            except Differs:
                return None
            finally:
                before.restore()
            ready = self._ready(Attempt(part, variants), variant, followed)
            return variant.captured, {
                n: v for n, v in ready.microbatch.inputs.items() if n not in part.inputs
            }

    def foreseen(self, parts: Sequence[Microbatch]) -> tuple[list[Microbatch], list[LossTerms]]:
        """Return microbatches with their host values, and what their losses are made of.

        As far as that is known before they run; what their glue does in Python is undone.
        """
        for part in parts:
            self.loss_terms(part)
        found = [(part, self.at_size(part)) for part in parts]
        ready = [replace(p, inputs={**p.inputs, **(at[1] if at else {})}) for p, at in found]
        return ready, list(map(self.loss_terms, parts))

    def early_hosts(self, part: Microbatch) -> dict[str, Any]:
        """Return the host values that do not depend on what blocks compute, such as counts.

        What its glue does in Python for that is undone.
        """
        with self._replaying():
            before, variants = self._python_state(), self._variants(part)
            captured = variants.found[0].captured
            try:
                hosts = captured.follow(part.inputs, variants.integers).hosts
            except Differs as error:
                logger.info("what Python counts for a later microbatch is not known: %s", error)
                return {}
            finally:
                before.restore()
        early = itertools.takewhile(lambda call: not call.is_late, captured.glue.calls)
        names = {name for call in early for name in call.lifted.values()}
        return {name: value for name, value in hosts.items() if name in names}

    def last_blocks(self, captured: CapturedModel) -> int:
        """Return how many blocks the last stage has."""
        return len(place_blocks(captured, self.plan)[-1])

    def with_blocks_apart(self, captured: CapturedModel, number: int) -> tuple[Stage, ...]:
        """Return the stages of a plan, the last ``number`` blocks in one more behind them."""
        key = id(captured), number
        if key not in self._apart:
            blocks = place_blocks(captured, self.plan)
            last = blocks.pop()
            parted = [*blocks, last[:-number], last[-number:]]
            if len(self._apart) >= self.max_shapes:
                self._apart.clear()
            self._apart[key] = captured, build_stages(captured, parted, self.recompute)
        return self._apart[key][1]

    def reads_values(self, part: Microbatch) -> bool:
        """Whether the glue reads values of tensors that stages compute for such a microbatch."""
        self.loss_terms(part)
        with self._replaying():
            found = self._variants(part).found
        return any(call.is_late for variant in found for call in variant.captured.glue.calls)

    @contextlib.contextmanager
    def _replaying(self) -> Iterator[None]:
        while self._replaced:
            self.on_drop(self._replaced.pop())
        self._modules = list(self.model.modules())
        parameters = tuple((p.requires_grad, p.dtype) for p in self.model.parameters())
        self._training = torch.is_grad_enabled(), parameters
        with autocast_region(self.precision, device_of(self.model)), tracing_patches(self.model):
            yield

    def _variants(self, part: Microbatch) -> ShapeVariants:
        return self._shapes.get((self._training, described(part.inputs)), ShapeVariants)

    def _followed(self, attempt: Attempt) -> Prepared:
        """Run the glue of one microbatch in one piece."""

        def follow(variant: ShapeVariant) -> Prepared:
            if variant.captured.glue.unsteady:
                raise CaptureError(variant.captured.glue.unsteady)
            followed = variant.captured.follow(attempt.inputs, attempt.variants.integers)
            return self._ready(attempt, variant, followed)

        return self._tried(attempt, follow)

    def _begun(self, attempt: Attempt) -> Prepared:
        """Run the glue of one microbatch up to the first value that its stages compute."""

        def begin(variant: ShapeVariant) -> Prepared:
            while True:
                self._remember(attempt, variant)
                region = partial(autocast_region, self.precision, device_of(self.model))
                integers = attempt.variants.integers
                run = GlueRun(variant.captured, attempt.inputs, integers, region)
                try:
                    run.start()
                except Unlifted as error:
                    run.close()
                    attempt.restore()
                    self._lift(variant, error)
                    continue
                except BaseException:
                    run.close()
                    raise
                if not run.is_live:
                    assert run.followed is not None
                    return self._ready(attempt, variant, run.followed)
                if variant.sized is not None:  # what it keeps is known by its own sizes
                    run.close()
                    variant.program.has_sizes = False
                    raise Differs("its own code reads or keeps tensors")
                if run.followed is not None:  # it only keeps something
                    kept = Unlifted(run.followed.changed, run.missing, run.followed.said)
                    self._lift(variant, kept)
                self._warn_once("microbatches run one after another: %s", run.reason)
                run.begin()
                changed = run.followed.named(variant.captured.glue) if run.followed else {}
                return attempt.prepared(variant, {**run.hosts, **changed}, run)

        return self._tried(attempt, begin)

    def _tried(self, attempt: Attempt, run: Callable[[ShapeVariant], Prepared]) -> Prepared:
        """Let the captures run that have not been tried, and then a new one."""
        variants, microbatch = attempt.variants, attempt.inputs
        if attempt.before is None:
            attempt.before = self._python_state()
        if not variants.found:
            variants.found.extend(self._kept(microbatch))
        for variant in [v for v in variants.found if v not in attempt.tried]:
            attempt.tried.append(variant)
            try:
                return run(variant)
            except Differs as error:
                attempt.restore()
                attempt.reason = attempt.reason or error
        if attempt.is_captured:
            self._refuse(attempt.reason)
        sized = None if attempt.is_sized else self._at_other_sizes(microbatch, attempt.before)
        attempt.is_sized = True
        variant = sized or self._captured(microbatch)
        attempt.is_captured = sized is None
        variants.note(variant, None if attempt.reason is None else attempt.reason.place)
        self._add(variants, variant, attempt.reason)
        attempt.tried.append(variant)
        try:
            return run(variant)
        except Differs as error:
            if sized is None:
                self._refuse(error)
            attempt.restore()
            attempt.reason = attempt.reason or error
            variants.found.remove(variant)
            return self._tried(attempt, run)

    def _refuse(self, error: Differs | None) -> NoReturn:
        raise CaptureError(
            f"{error}: the code between the blocks of {type(self.model).__name__} does "
            "something else in every run, and not because of a number, so that no capture can "
            "follow it; keep what changes inside a block"
        ) from error

    def _ready(self, attempt: Attempt, variant: ShapeVariant, followed: Followed) -> Prepared:
        hosts = dict(followed.hosts)
        if followed.changed:
            self._lift(variant, Unlifted(followed.changed, frozenset(), followed.said))
            hosts.update(followed.named(variant.captured.glue))
        return attempt.prepared(variant, hosts)

    def _remember(self, attempt: Attempt, variant: ShapeVariant) -> None:
        """Keep what its blocks change, too, if they may have to run again."""
        if any(call.is_late for call in variant.captured.glue.calls):
            if not attempt.is_deep:
                attempt.before, attempt.is_deep = PythonState(self._modules), True
            for tensor in variant.captured.changing:
                attempt.tensors.setdefault(id(tensor), (tensor, tensor.detach().clone()))

    def _python_state(self) -> PythonState:
        """Return what the glue may change before it turns out to be another one."""
        glue = frozenset[int]()
        for program in self._programs()[:1]:
            glue = program.captured.glue.leaves.glue
        own = [m for m in self._modules if id(m) in glue]
        return PythonState(own, [m for m in self._modules if id(m) not in glue])

    def _at_other_sizes(
        self, microbatch: Mapping[str, Any], before: PythonState
    ) -> ShapeVariant | None:
        """Return a known program that does what this microbatch does, with other numbers."""
        for program in self._programs():
            if program.training != self._training:
                continue
            if program.has_sizes is None:  # are its shapes found as they were?
                own = self._sized(program, None, before)
                program.has_sizes = own is not None and own.specs == program.captured.specs
            sized = self._sized(program, microbatch, before) if program.has_sizes else None
            if sized is None:
                continue
            if sized.changed:
                self._rebuild(program, program.captured.with_hosts(sized.changed, sizes=True))
            return ShapeVariant.of(program, sized)
        return None

    def _sized(
        self, program: StagedProgram, microbatch: Mapping[str, Any] | None, before: PythonState
    ) -> Sized | None:
        try:
            return program.captured.sized(microbatch)
        except Differs as error:
            logger.debug("another program, or its shapes depend on values: %s", error)
            return None
        finally:
            before.restore()

    def _programs(self) -> list[StagedProgram]:
        """Return the known programs, the last used first."""
        found = (v.program for variants in self._shapes.values() for v in variants.found)
        return list(dict.fromkeys([*found, *self._spare]))

    def _rebuild(self, program: StagedProgram, captured: CapturedModel) -> None:
        """Let a program, at all its sizes, have other stages."""
        program.captured = captured
        program.stages = self._built(captured, program.uses)
        for variants in self._shapes.values():
            for variant in variants.found:
                if variant.program is program:
                    self._replaced.append(variant.stages)  # this step may still run them
                    made = ShapeVariant.of(program, variant.sized)
                    variant.captured, variant.stages = made.captured, made.stages

    def _add(self, variants: ShapeVariants, variant: ShapeVariant, reason: Differs | None) -> None:
        variants.found.insert(0, variant)
        if reason is not None and variant.sized is None:
            logger.warning("captured again, as capture %d: %s", self.captures, reason)
        if len(variants.found) > self.max_shapes:
            self.on_drop(variants.found.pop().stages)
            self._warn_once(
                "the code between the model's blocks has done more than %d different things for "
                "one shape of microbatch (the last: %s); the least recently used captures are "
                "forgotten and made again, which takes longer than a step: let it depend on fewer "
                "values, or move it into a block",
                self.max_shapes,
                reason,
            )

    def _lift(self, variant: ShapeVariant, values: Unlifted) -> None:
        """Let the graph share numbers that have changed, and tensors that are kept."""
        if not values.changed and not values.kept:
            return
        if values.changed:
            logger.info("an input of the graph from now on: %s", values.said)
        program = variant.program
        self._rebuild(program, program.captured.with_hosts(values.changed, values.kept))

    def _kept(self, microbatch: Mapping[str, Any]) -> list[ShapeVariant]:
        """Return the capture that the plan was made from, if there is one of this shape."""
        if serialized(self.plan):  # serialized tables are found while a capture runs
            return []
        training, granularity = torch.is_grad_enabled(), self.plan.granularity
        known = take_kept(self.model, microbatch, granularity, training=training)
        return [] if known is None else [self._variant(known, TableUses())]

    def _captured(self, microbatch: Mapping[str, Any]) -> ShapeVariant:
        uses = TableUses()
        with uses:
            captured = capture(
                self.model,
                microbatch,
                granularity=self.plan.granularity,
                self_check=self.self_check,
                training=torch.is_grad_enabled(),
            )
        variant = self._variant(captured, uses)
        self.captures += 1
        logger.info("capture %d: %d stages", self.captures, len(variant.stages))
        return variant

    def _variant(self, captured: CapturedModel, uses: TableUses) -> ShapeVariant:
        if not serialized(self.plan):  # whose loss is taken apart
            captured = factored(with_counted(captured))
        if captured.training:
            self._check_blocks([program.name for program in captured.programs])
        captured.glue.session.live, captured.glue.session.replayed = self.live, True
        if self.live and captured.glue.hosts:
            captured = captured.with_hosts({})
        program = StagedProgram(self._training, captured, uses, self._built(captured, uses))
        return ShapeVariant.of(program)

    def _built(self, captured: CapturedModel, uses: TableUses) -> tuple[Stage, ...]:
        blocks = place_blocks(captured, self.plan)
        places = {name: index for index, names in enumerate(blocks) for name in names}
        verify_state(captured.state, places)
        tables = find_tables(captured, uses, serialized(self.plan))
        row_shards = shard_tables(captured, self.plan, tables)
        stages = build_stages(captured, blocks, self.recompute, tables, row_shards)
        if self.plan.vocabulary is not None and captured.training:
            stages[-1].spread = spread_table(self.model, self.plan, stages[-1].programs)
        for stage in stages:
            stage.compiled, stage.offload = self.compile_blocks, self.offload
        return stages

    def _warn_once(self, message: str, *values: Any) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *values)

    def _dropped(self, variants: ShapeVariants) -> None:
        for variant in variants.found:
            self.on_drop(variant.stages)
        alive = {v.program for others in self._shapes.values() for v in others.found}
        lost = {v.program: None for v in variants.found if v.program not in alive}
        kept = [p for p in [*lost, *self._spare] if p not in alive and p.has_sizes is not False]
        self._spare = kept[: self.max_shapes]
        if kept == self._spare and lost.keys() <= set(kept):
            return
        self._warn_once(
            "microbatches have come in more than %d shapes; the least recently used ones are "
            "forgotten and captured again when they return, which takes longer than a step: "
            "pad to fewer lengths (pad_to_multiple_of)",
            self._shapes.limit,
        )

    def _check_blocks(self, found: Sequence[str]) -> None:
        planned = [block.name for block in self.plan.blocks]
        # Whether a loss stands alone depends on the function that computes it.
        missing = [name for name in planned if name not in (*found, LOSS)]
        extra = [name for name in found if name not in (*planned, LOSS)]
        if missing or extra:
            raise PlanError(
                "the model's blocks for this batch are not those of the plan: "
                f"missing {', '.join(missing) or 'none'}; new {', '.join(extra) or 'none'}; make "
                "the plan with an example batch that has the same inputs as the training batches, "
                "and let a block itself decide, not the code around it, whether it does something"
            )
