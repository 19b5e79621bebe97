"""What one stage computes, as torch's stages want it: tensors in, a tuple of tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ipu_pipeline.capture.values import TensorMeta
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.serialize import add_gradient
from ipu_pipeline.stages.stage import LateLoss, Stage
from ipu_pipeline.stages.training import autocast_region

if TYPE_CHECKING:
    from ipu_pipeline.backends.cluster.vocabulary import SpreadVocabulary


@dataclass
class StepInputs:
    """What the stages of a rank read in one step besides what they receive.

    ``microbatches`` are those of this rank's replica; seed and step key the random numbers.
    """

    microbatches: Sequence[Microbatch] = ()
    seed: int = 0
    global_step: int = 0
    precision: str = "float32"
    loss_scaling: float = 1.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class StageModule(nn.Module):
    """A stage as a module; ``received`` and ``sent`` are names of values, relayed ones too.

    ``inputs`` are filled before every step; ``vocabulary`` is what is spread over processes.
    """

    def __init__(
        self,
        stage: Stage,
        received: Sequence[str],
        sent: Sequence[str],
        inputs: StepInputs,
        vocabulary: SpreadVocabulary | None = None,
    ) -> None:
        super().__init__()
        self.stage = stage
        self.received = tuple(received)
        self.sent = tuple(sent)
        self.inputs = inputs
        self.results: dict[int, dict[str, Tensor]] = {}
        self.blocks = nn.ModuleList(program.module for program in stage.programs)
        self._lookups: list[tuple[nn.Parameter, Tensor]] = []
        self.vocabulary = vocabulary
        self._late: dict[int, LateLoss] = {}
        if vocabulary is not None:
            stage.calls = vocabulary.calls

    def forward(self, *received: Tensor, microbatch: Tensor) -> tuple[Tensor, ...]:
        """Run one microbatch.

        Args:
            *received: Values of earlier stages, in the order of ``received``.
            microbatch: Its position in the replica's share of the batch, shape ``(1,)``.

        Returns:
            The values that go to the next stage, each contiguous and nobody's view.
        """
        position = int(microbatch)
        part = self.inputs.microbatches[position]
        key = (self.inputs.seed, self.inputs.global_step, part.index)
        values = dict(zip(self.received, received, strict=True))
        with autocast_region(self.inputs.precision, self.inputs.device):
            computed, blocks = self.stage.compute(part.inputs, values, key)
        self._lookups.extend(blocks.leaves.pairs())
        self.results[position] = {
            name: computed[value].detach()
            for name, value in self.stage.results.items()
            if value in computed
        }
        if blocks.spread is not None:
            assert self.vocabulary is not None
            self._late[position] = LateLoss(computed, blocks, key)
            self.vocabulary.ask(position, blocks.spread)
            # What torch makes of it is not used: the loss is known in the backward pass.
            return (torch.zeros((), requires_grad=True),)
        return _sendable([computed[name] for name in self.sent], received)

    @property
    def reads_spread_tables(self) -> bool:
        """Whether other processes work for its passes, of which none may be tried out."""
        vocabulary = self.vocabulary
        return vocabulary is not None and any(map(vocabulary.is_table, self.parameters()))

    def late_loss(self, position: int) -> Tensor | None:
        """Return the loss of a microbatch whose softmax is spread, before its backward pass."""
        late = self._late.pop(position, None)
        if late is None:
            return None
        assert self.vocabulary is not None
        with autocast_region(self.inputs.precision, self.inputs.device):
            results = self.stage.late_results(late, self.vocabulary.parts(position))
        self.results[position].update((n, value.detach()) for n, value in results.items())
        part = self.inputs.microbatches[position]
        return results["loss"] * (part.share * self.inputs.loss_scaling)

    def finish(self) -> None:
        """Add the gradients of lookups to their tables (after all backward passes)."""
        for table, leaf in self._lookups:
            if leaf.grad is not None:
                add_gradient(table, leaf.grad)
        self._lookups.clear()

    def clear(self) -> None:
        """Forget the last step."""
        self._lookups.clear()
        self._late.clear()
        self.results.clear()


@dataclass(frozen=True)
class Crossings:
    """Which values cross from every stage to the next one; those for later stages are relayed.

    ``names[i]`` are those of the values that go from stage ``i`` to ``i + 1``.
    """

    names: tuple[tuple[str, ...], ...]
    specs: Mapping[str, TensorMeta] = field(default_factory=dict)

    def into(self, stage: int) -> tuple[str, ...]:
        """Return the names of what ``stage`` receives."""
        return self.names[stage - 1] if stage > 0 else ()

    def tensors(self, names: Sequence[str], *, grad: bool) -> tuple[Tensor, ...]:
        """Return tensors without data that describe ``names``."""
        return tuple(
            torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta").requires_grad_(
                spec.requires_grad and grad
            )
            for spec in (self.specs[name] for name in names)
        )


def crossings(stages: Sequence[Stage]) -> Crossings:
    """Return what crosses between ``stages``; a loss computed early goes on to the last one.

    Raises:
        LoweringError: A value that crosses is not a tensor.
    """
    source = {name: stage.index for stage in stages for name in stage.sends}
    last = {name: stage.index for stage in stages for name in stage.receives}
    specs = {name: spec for stage in stages for name, spec in stage.specs.items()}
    final = len(stages) - 1
    for stage in stages:
        if "loss" in stage.results and stage.index < final:
            source[stage.results["loss"]] = stage.index
            last[stage.results["loss"]] = final
    missing = [name for name in source if name in last and name not in specs]
    if missing:
        raise LoweringError(
            f"{', '.join(missing)} would cross from stage {source[missing[0]]} to the next, but "
            "stages of the distributed target exchange tensors only; move the blocks that "
            "compute and use it into one stage"
        )
    names = tuple(
        tuple(n for n, first in source.items() if first <= boundary < last.get(n, first))
        for boundary in range(final)
    )
    return Crossings(names, specs)


def _sendable(values: Sequence[Tensor], received: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return ``values`` as gloo and the split backward passes can take them.

    A relayed value must be the very leaf that came in. Others must be contiguous, and neither
    views (they cannot be detached in place) nor one tensor twice.
    """
    seen: set[int] = set()
    sent = []
    for value in values:
        relayed = any(value is leaf for leaf in received)
        aliased = value._is_view() or id(value) in seen or isinstance(value, nn.Parameter)
        if not value.is_contiguous() or (aliased and not relayed):
            value = value.clone(memory_format=torch.contiguous_format)
        seen.add(id(value))
        sent.append(value)
    return tuple(sent)
