"""One stage: the programs of its blocks, forward and backward, one microbatch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.loss_terms import LossTerms, factor_name
from ipu_pipeline.capture.named_ids import naming_ids
from ipu_pipeline.capture.programs import Program
from ipu_pipeline.capture.values import TensorMeta, reached
from ipu_pipeline.ops.linear import adding_to, adding_to_grad
from ipu_pipeline.ops.random import block_scope
from ipu_pipeline.stages.block_runs import ReplayedBlock, offloaded, run_compiled
from ipu_pipeline.stages.serialize import (
    GradientSum,
    SerializedForward,
    add_gradient,
    no_calls,
)
from ipu_pipeline.stages.tables import RowShard, Table
from ipu_pipeline.stages.vocabulary import SoftmaxPart, SpreadLoss, SpreadTable

RandomKey = tuple[int | str, ...]


@dataclass
class _InFlight:
    """What a stage keeps of one microbatch between its forward and its backward pass."""

    received: dict[str, Tensor]
    sent: dict[str, Tensor]
    loss: Tensor | None
    lookups: tuple[tuple[nn.Parameter, Tensor], ...]
    inputs_with_gradient: bool
    late: LateLoss | None = None


@dataclass(frozen=True)
class LateLoss:
    """The loss of a microbatch whose softmax other stages compute: run again when they have.

    Attributes:
        values: What the other blocks have computed, by name.
        blocks: What ran them.
        key: Of random numbers.
    """

    values: dict[str, Any]
    blocks: SerializedForward
    key: RandomKey

    @property
    def spread(self) -> SpreadLoss:
        """What it needs of the other stages."""
        assert self.blocks.spread is not None
        return self.blocks.spread


@dataclass
class Stage:
    """The code of one stage.

    Attributes:
        index: Position in the pipeline.
        programs: Programs of its blocks, in execution order.
        prelude: Computes what they need from the model inputs alone.
        receives: Names of the values that earlier stages compute for it.
        sends: Names of the values that later stages or the caller need.
        recompute: Names of the blocks whose forward pass runs again in the backward pass.
        shared: Parameters that other stages use too.
        results: Value name by result name, for results that this stage computes.
        order: Names of the results of all stages, as the model returns them.
        tables: Tables of its serialized blocks, by block name.
        fused: Its serialized projections whose logits only its loss reads.
        row_shards: Rows that it holds of tables that several stages hold.
        specs: Descriptions of the tensors that it sends, by name.
        loss_terms: What the loss is made of, on every stage.
        live: Whether one of its blocks runs code that may use any tensor, once per microbatch.
        in_order: Whether a microbatch has to end before the next one begins, on every stage.
        late_values: What Python read of values that stages compute, at the capture; on every stage.
        thread_bound: Whether the model's code reads what only the caller's thread sees.
        offload: Names of the blocks that keep their activations in host memory.
        compiled: Whether its blocks go through ``torch.compile``.
        spread: The vocabulary that is spread over stages, in the last one.
        calls: A region for every block, in which calls that read its tables are taken.
    """

    index: int
    programs: tuple[Program, ...]
    prelude: Program
    receives: tuple[str, ...]
    sends: tuple[str, ...]
    recompute: frozenset[str]
    shared: tuple[nn.Parameter, ...]
    results: Mapping[str, str]
    tables: Mapping[str, Table] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()
    row_shards: tuple[RowShard, ...] = ()
    specs: Mapping[str, TensorMeta] = field(default_factory=dict)
    loss_terms: LossTerms = field(default_factory=LossTerms)
    live: bool = False
    in_order: bool = False
    late_values: tuple[Any, ...] = ()
    thread_bound: bool = False
    order: tuple[str, ...] = ()
    offload: frozenset[str] = frozenset()
    compiled: bool = False
    spread: SpreadTable | None = None
    calls: Callable[[Program], AbstractContextManager[None]] = no_calls
    block: str = ""
    _in_flight: dict[int, _InFlight] = field(default_factory=dict)
    _replayed: dict[str, ReplayedBlock] = field(default_factory=dict)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The distinct trainable parameters of its blocks."""
        found = {id(p): p for program in self.programs for p in program.module.parameters()}
        return tuple(parameter for parameter in found.values() if parameter.requires_grad)

    def forward(
        self,
        microbatch: int,
        inputs: Mapping[str, Any],
        received: Mapping[str, Tensor],
        key: RandomKey,
        *,
        alone: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the forward pass of one microbatch.

        Args:
            microbatch: Its index.
            inputs: Model inputs by name.
            received: Values of earlier stages by name.
            key: Random numbers are keyed by this and the block's name.
            alone: No other microbatch of this stage is in flight before its backward pass: a
                fused loss then computes its gradients at once.

        Returns:
            What it sends on, and the results it computed (detached).
        """
        # Cut off from the graph of the stages that computed them.
        leaves = {
            n: v.detach().requires_grad_() if v.requires_grad else v for n, v in received.items()
        }
        values, blocks = self.compute(inputs, leaves, key, alone=alone)
        sent = {name: values[name] for name in self.sends}
        late = None if blocks.spread is None else LateLoss(values, blocks, key)
        results = {name: values[value] for name, value in self.results.items() if value in values}
        if torch.is_grad_enabled():
            loss = results.get("loss")
            needed = any(isinstance(v, Tensor) and v.requires_grad for v in inputs.values())
            self._in_flight[microbatch] = _InFlight(
                leaves, sent, loss, blocks.leaves.pairs(), needed, late
            )
        return sent, {name: value.detach() for name, value in results.items()}

    def softmax_of(self, microbatch: int) -> SpreadLoss:
        """Return what the loss of a microbatch needs of a vocabulary that is spread."""
        late = self._in_flight[microbatch].late
        assert late is not None
        return late.spread

    def finish_loss(
        self, microbatch: int, parts: Mapping[int, Sequence[SoftmaxPart]]
    ) -> dict[str, Tensor]:
        """Run the loss of a microbatch on the parts of all stages; return its results (detached).

        Call it before the backward pass of that microbatch.
        """
        state = self._in_flight[microbatch]
        assert state.late is not None
        results = self.late_results(state.late, parts)
        state.loss = results.get("loss")
        return {name: value.detach() for name, value in results.items()}

    def late_results(
        self, late: LateLoss, parts: Mapping[int, Sequence[SoftmaxPart]]
    ) -> dict[str, Tensor]:
        """Run a loss on the parts of all stages; return its results by name."""
        late.spread.combine(parts)
        self.block = LOSS
        self._run(self.programs[-1], late.values, late.key, late.blocks)
        late.spread.free()
        self.block = ""
        own = self.programs[-1].outputs
        return {n: late.values[v] for n, v in self.results.items() if v in own}

    def compute(
        self,
        inputs: Mapping[str, Any],
        received: Mapping[str, Tensor],
        key: RandomKey,
        *,
        alone: bool = False,
    ) -> tuple[dict[str, Any], SerializedForward]:
        """Run its blocks on values that stay part of the caller's graph; remember nothing.

        Arguments are those of :meth:`forward`. Returns every value by name, and what ran the
        serialized blocks.
        """
        values: dict[str, Any] = {name: _input(inputs, name) for name in self.prelude.inputs}
        self.block = "prelude"
        if self.prelude.outputs:  # fx cannot call a module without arguments
            self.prelude.run(values)
        values.update(received)
        again = self.recompute.intersection((*self.fused, LOSS))
        blocks = SerializedForward(
            self.tables, self.fused, self.row_shards, hold_gradients=alone and not again
        )
        blocks.calls = self.calls
        if self.spread is not None and torch.is_grad_enabled():
            blocks.spread = SpreadLoss(self.spread)
        self.block = "tables of other stages"
        blocks.look_up_row_shards(values)
        for program in self.programs:
            self.block = program.name
            if blocks.spread is not None and program.name == LOSS:
                arguments = [values[name] for name in program.inputs]
                with block_scope(*key, LOSS):
                    blocks.spread.collect(partial(program, *arguments))
                continue
            away = program.name in self.offload and torch.is_grad_enabled()
            with offloaded(program) if away else nullcontext():
                self._run(program, values, key, blocks)
            self._note_backward(program, values)
        self.block = ""
        return values, blocks

    def backward(
        self,
        microbatch: int,
        gradients: Mapping[str, Tensor],
        loss_gradient: float,
        sums: Mapping[Tensor, GradientSum] | None = None,
    ) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
        """Run the backward pass of one microbatch.

        Args:
            microbatch: Its index.
            gradients: Gradients of sent values by name, summed over their consumers.
            loss_gradient: Gradient of this microbatch's loss.
            sums: Of another replica, in whose place ``.grad`` is not touched; some gradients are
                added to what is there already, the others are returned.

        Returns:
            Gradients of the received values by name, and of tensors that other stages may add
            to as well, dense or sparse, perhaps several of one: shared parameters, and whatever
            a live loss uses. Gradients of all others are added to their ``.grad``.
        """
        state = self._in_flight.pop(microbatch)
        roots, seeds = _roots(state, gradients, loss_gradient)
        wanted = [leaf for leaf in state.received.values() if leaf.requires_grad]
        if not roots:
            return {}, []
        shared: list[tuple[Tensor, Tensor]] = []
        others: list[Tensor] = []
        if state.inputs_with_gradient or self.live:
            looked_up = (tensor for pair in state.lookups for tensor in pair)
            others = _other_leaves(roots, [*wanted, *self.parameters, *looked_up])
        if self.shared or others or sums is not None:
            shared = self._backward_apart(roots, seeds, wanted, state, others, sums)
        else:
            with adding_to_grad():
                torch.autograd.backward(roots, seeds)
            for table, leaf in state.lookups:
                if leaf.grad is not None:
                    add_gradient(table, leaf.grad)
        self.block = ""
        found = {n: leaf.grad for n, leaf in state.received.items() if leaf.grad is not None}
        return found, shared

    def clear(self) -> None:
        """Forget every microbatch in flight (after a failure)."""
        self._in_flight.clear()

    def _run(
        self, program: Program, values: dict[str, Any], key: RandomKey, blocks: SerializedForward
    ) -> None:
        def call(*inputs: Any) -> Any:
            # entered again when it is recomputed
            with block_scope(*key, program.name), naming_ids(program.module):
                return blocks.run(program, inputs)

        inputs = tuple(values[name] for name in program.inputs)
        again = program.name in self.recompute and torch.is_grad_enabled()
        if self.compiled and self._can_be_compiled(program):
            outputs = run_compiled(program, inputs, recompute=again)
        elif again and not (
            program.name == LOSS and (self.fused or self.spread)
        ):  # that one does it by itself
            replayed = self._replayed.setdefault(program.name, ReplayedBlock(program))
            call = replayed.passes(call)
            inputs = replayed.unshared(inputs)
            outputs = checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            with program.saving_copies():
                outputs = call(*inputs)
        values.update(zip(program.outputs, outputs, strict=True))

    def _can_be_compiled(self, program: Program) -> bool:
        own = {*self.tables, *self.fused}
        if self.spread is not None:
            own |= {LOSS, self.spread.block}
        return not (program.name in own or program.changing or self.live or program.draws)

    def _note_backward(self, program: Program, values: Mapping[str, Any]) -> None:
        """Let the stage say that a backward pass is in this block when it comes to it."""

        def note(_: Tensor) -> None:
            self.block = program.name

        for name in program.outputs:
            value = values[name]
            # Deferred logits have no node: to look for one would compute them.
            if type(value) is Tensor and value.grad_fn is not None:
                value.register_hook(note)

    def _backward_apart(
        self,
        roots: Sequence[Tensor],
        seeds: Sequence[Tensor | None],
        wanted: Sequence[Tensor],
        state: _InFlight,
        others: Sequence[Tensor],
        sums: Mapping[Tensor, GradientSum] | None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Backward pass that keeps gradients of shared parameters and of ``others`` apart.

        Two stages adding to one ``.grad`` in any order would make the sum depend on timing. With
        ``sums``, those of all parameters are kept apart.
        """
        own = [*self.parameters, *others]
        leaves = [*wanted, *own, *(leaf for _, leaf in state.lookups)]
        there = ((parameter, one.own()) for parameter, one in (sums or {}).items())
        with adding_to({parameter: dense for parameter, dense in there if dense is not None}):
            found: Sequence[Tensor | None] = torch.autograd.grad(
                roots, leaves, seeds, allow_unused=True, retain_graph=state.inputs_with_gradient
            )
        for leaf, gradient in zip(wanted, found, strict=False):
            leaf.grad = gradient
        shared_ids = {id(parameter) for parameter in (*self.shared, *others)}
        shared = []
        parameters = [*own, *(table for table, _ in state.lookups)]
        for parameter, gradient in zip(parameters, found[len(wanted) :], strict=True):
            if gradient is not None and (sums is not None or id(parameter) in shared_ids):
                shared.append((parameter, gradient))
            elif gradient is not None:
                add_gradient(parameter, gradient)
        return shared


def _input(inputs: Mapping[str, Any], name: str) -> Any:
    if name not in inputs and name.startswith(factor_name("")):
        return torch.ones(())  # terms of the loss are what they are, unless a batch says more
    return inputs[name]


def _roots(
    state: _InFlight, gradients: Mapping[str, Tensor], loss_gradient: float
) -> tuple[list[Tensor], list[Tensor | None]]:
    roots: list[Tensor] = []
    seeds: list[Tensor | None] = []
    for name, value in state.sent.items():
        if value.requires_grad and name in gradients:
            roots.append(value)
            seeds.append(gradients[name])
    if state.loss is not None and state.loss.requires_grad:
        roots.append(state.loss)
        seeds.append(torch.full_like(state.loss, loss_gradient))
    return roots, seeds


def nodes_behind(roots: Iterable[Tensor]) -> set[Any]:
    """Return the nodes of the autograd graph that a backward pass from ``roots`` would reach."""
    first = [root.grad_fn for root in roots if root.grad_fn is not None]
    return set(reached(first, lambda node: [n for n, _ in node.next_functions if n is not None]))


def _other_leaves(roots: Sequence[Tensor], known: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that gradients of ``roots`` would be added to, but for those known."""
    ids = {id(tensor) for tensor in known}
    leaves = (getattr(node, "variable", None) for node in nodes_behind(roots))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in ids]
