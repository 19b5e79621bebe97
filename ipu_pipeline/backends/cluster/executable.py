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

from ipu_pipeline.backends.cluster.checkpoints import ShardedCheckpoints, collect_weights
from ipu_pipeline.backends.cluster.cut_plan import refuse_whole_tensors
from ipu_pipeline.backends.cluster.inference import (
    agreed,
    call_on_ranks,
    check_same_tokens,
    refuse,
)
from ipu_pipeline.backends.cluster.joining import Joining, read_own_weights, slices_of
from ipu_pipeline.backends.cluster.passes import RankPasses
from ipu_pipeline.backends.cluster.row_slices import RowSlices, row_plan
from ipu_pipeline.backends.cluster.sharding import (
    OwnParameters,
    collect_states,
    grad_norm,
    keep_own_states,
    update,
)
from ipu_pipeline.backends.cluster.vocabulary import SpreadVocabulary
from ipu_pipeline.capture.named_ids import naming_ids
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.calls import check_call
from ipu_pipeline.stages.devices import chosen_device, move
from ipu_pipeline.stages.executable import EvalResult, Executable, ExecutionOptions, StepResult, T
from ipu_pipeline.stages.materialize import is_on_meta
from ipu_pipeline.stages.training import in_evaluation


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
        self._passes = RankPasses(
            model,
            plan,
            options,
            self.groups,
            self._slices,
            self._own,
            device,
            holds_all=self._holds_all,
        )
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
            passes, step = self._passes, self.global_step
            made = passes.accumulate(passes.cut(batch, step), step, scaling, for_update=True)
            with self._watchdog.activity.during("the optimizer step"):
                done = update(
                    optimizer,
                    made.ownership.held(self.model),
                    made.ownership,
                    self.groups,
                    loss_scaling=scaling,
                    max_grad_norm=self.options.max_grad_norm,
                    masters=self._masters,
                    slices=self._slices,
                )
            self._scaler.update(skipped=done.skipped)
            loss, samples = passes.shares.total([made.loss, made.num_samples])
        return self.stepped(StepResult(loss, done.grad_norm, done.skipped, int(samples)))

    def forward_backward(self, batch: Mapping[str, Any]) -> float:
        """Return the mean loss; add gradients to ``.grad`` of this process's own parameters.

        Raises:
            StageError: This process or another one failed; gradients are then incomplete.
        """
        self.options.require_training()
        with self._running("a forward and backward pass"):
            passes, step = self._passes, self.global_step
            made = passes.accumulate(passes.cut(batch, step), step)
            return passes.shares.total([made.loss])[0]

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
            step = self.global_step
            cut = self._passes.given(parts, weights, first, step)
            return self._passes.accumulate(cut, step).losses

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Return sums of what each replica has counted of its share of the batches."""
        with self._running("adding up what the replicas have"):
            return self._passes.shares.total(numbers)

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Clip gradients as ``torch.nn.utils.clip_grad_norm_``; return their norm over all ranks.

        Every process passes the same parameters of the model.
        """
        with self._running("clipping gradients"):
            own = [p for p in parameters if p.grad is not None]
            norm = grad_norm(own, self._passes.known_ownership(), self.groups, self._slices)
            clip_grads_with_norm_(own, max_norm, norm)
        return norm

    def share_of(self, num_samples: int) -> slice:
        """Return which samples of a batch this process passes to a training step."""
        return self._passes.shares.of(num_samples)

    def eval_step(self, batch: Mapping[str, Any]) -> EvalResult:
        """Run the model in evaluation mode, without gradients; every process gets the result.

        With ``batches="share"`` replicas may be given batches of their own: each gets its own
        result.

        Raises:
            StageError: This process or another one failed.
        """
        with self._running("evaluation"), in_evaluation(self.model), torch.no_grad():
            return self._passes.evaluate(batch, self.global_step)

    def eval_parts(self, parts: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
        """Evaluate batches of any shapes in one pass of the pipeline; every process gets all.

        Raises:
            LoweringError: There is no batch.
            StageError: This process or another one failed.
        """
        with self._running("evaluation"), in_evaluation(self.model), torch.no_grad():
            return self._passes.evaluate_parts(parts, self.global_step)

    def _call_model(
        self, name: str, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> list[Any]:
        """Run the model's own code on every rank; see :mod:`.placed`."""
        check_call(self.model, name)
        refuse(self.plan, self.options, self.groups.layout, [given for _, given in calls])
        what = "generation" if name == "generate" else "a forward pass"
        with self._running(what), in_evaluation(self.model), torch.no_grad():
            named = [{**{str(n): arg for n, arg in enumerate(a)}, **k} for a, k in calls]
            self._passes.batch_check.check(what, self.global_step, *named)
            self._passes.share_buffers()
            changing = agreed(self.model, self._passes.changing, self.groups)
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
        ownership = self._passes.ownership
        if ownership is not None:
            with self._running("collecting weights"):
                self._passes.share_buffers()
                collect_weights(self.model, ownership, self.groups)

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
            ownership = self._passes.ownership
            if ownership is not None:
                collect_states(optimizer, ownership, self.groups)

    def keep_own_optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop what an optimizer of the caller's keeps of parameters that are updated elsewhere."""
        keep_own_states(optimizer, self._passes.known_ownership())

    def save_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> Path:
        """Write one checkpoint of the whole model; every rank writes what it owns.

        Arguments and errors are those of :class:`Executable`; of ``path``, ``extra`` and
        ``attach`` the first rank's count.
        """
        with self._running("saving a checkpoint"):
            scaling, step = self._scaler.state(), self.global_step
            return self._checkpoints.save(
                path, self._passes.ownership, step, scaling, *args, **options
            )

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
            info = self._checkpoints.load(path, self._passes.ownership)
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
        self._passes.close()
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
