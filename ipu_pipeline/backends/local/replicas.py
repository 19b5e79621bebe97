"""Replicas of one process: their stages, and what must not change while they run.

All share the weights and the modules. A forward pass that changes what the next one reads has no
order among replicas, so one replica then runs all microbatches; a change that no capture has shown
is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from ipu_pipeline.capture.state import PlainState, kept_tensors
from ipu_pipeline.errors import LoweringError, listed
from ipu_pipeline.stages.block_runs import running_statistics
from ipu_pipeline.stages.stage import Stage
from ipu_pipeline.stages.variants import Prepared


def stages_of_replicas(
    group: Sequence[Prepared], replica_of: Sequence[int] | None
) -> list[tuple[Stage, ...]]:
    """Return the stages of every microbatch; each replica keeps its own microbatches in flight."""
    made: dict[tuple[int, int], tuple[Stage, ...]] = {}
    found = []
    for one, replica in zip(group, replica_of or [0] * len(group), strict=True):
        key = replica, id(one.stages)
        if replica and key not in made:
            made[key] = tuple(replace(s, _in_flight={}, _replayed={}) for s in one.stages)
        found.append(made.get(key, one.stages))
    return found


def changes_state(stages: Iterable[Stage]) -> bool:
    """Whether a forward pass changes what others read: buffers, generators, running statistics."""
    programs = {id(program): program for stage in stages for program in stage.programs}.values()
    return any(
        program.changing or program.draws or any(running_statistics(program.module.modules()))
        for program in programs
    )


@contextmanager
def unchanged(model: nn.Module, num_replicas: int) -> Iterator[None]:
    """Refuse what forward passes of several replicas have changed at the same time.

    Raises:
        LoweringError: Attributes or tensors that modules keep; attributes are put back.
    """
    modules = [*model.modules()]
    before = PlainState(modules)
    versions = [(name, tensor, tensor._version) for name, tensor in kept_tensors(modules)]
    yield
    changed = before.changed()
    changed += [name for name, tensor, version in versions if tensor._version != version]
    if changed:
        before.put_back()
        raise LoweringError(
            f"{listed(dict.fromkeys(changed))} changed in forward passes of {num_replicas} "
            "replicas, which run at the same time, and would depend on timing; no weight was "
            "changed: plan with replicas=1"
        )
