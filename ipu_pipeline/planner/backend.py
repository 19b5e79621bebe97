"""What a backend is, and how one is found: by folder or entry point, imported when asked for.

A backend prices, constrains and runs the stages of its machines. It is one object ``BACKEND`` in
``ipu_pipeline/backends/<name>/backend.py``, or in a module that a distribution announces under the
entry point group ``ipu_pipeline.backends``. Nothing but ``lower`` and ``doctor`` may import torch,
so that a saved plan is priced without it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ipu_pipeline.errors import LoweringError, PlanError
from ipu_pipeline.ir.entry_points import installed
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.options.block_cost import GraphCosts

if TYPE_CHECKING:
    from ipu_pipeline.planner.price import PlanPrice
    from ipu_pipeline.planner.search import Constraints, Partition

logger = logging.getLogger(__name__)
GROUP = "ipu_pipeline.backends"
_FOLDER = Path(__file__).parents[1] / "backends"


@dataclass(frozen=True)
class Workload:
    """What is to be priced: a model on a machine, and how it is run.

    Attributes:
        graph: The model, for one microbatch.
        machine: Where it runs.
        schedule: Name of the schedule.
        num_microbatches: Microbatches per optimizer step of one replica.
        replicas: Copies of the pipeline.
        settings: The backend's own settings, as JSON data.
        measured_s: Measured forward and backward seconds by block; empty: computed.
        factors: Numbers of slices that must have a price, by block.
        apart: Output projections that are in another stage than their loss.
    """

    graph: BlockGraph
    machine: Machine
    schedule: str
    num_microbatches: int
    replicas: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    measured_s: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    factors: Mapping[str, int] = field(default_factory=dict)
    apart: tuple[str, ...] = ()


class Backend(Protocol):
    """One kind of machines: prices, rules, schedules, lowering.

    One that derives from this has no settings, no rules of its own, and counted or measured costs.

    Attributes:
        name: Name of its folder or entry point.
        target: What users give to ``compile(target=...)``.
        schedules: Names of the schedules it runs; the first is the default.
        replays_glue: It runs the model's own code between the blocks for every batch.
    """

    name: str
    target: str
    replays_glue: bool = True

    @property
    def schedules(self) -> tuple[str, ...]:
        """Names of the schedules it runs; the first is the default."""

    def own_machine(self, num_devices: int | None) -> Machine | None:
        """Return the machine that is called like the backend, if there is one: ``local``.

        Args:
            num_devices: Devices that the pipeline needs; ``None``: as many as there are.
        """
        ...

    def prices_machine(self, machine: Machine) -> bool:
        """Whether a description that names no backend is of this one's kind."""
        ...

    def settings(self, graph: BlockGraph, config: Any, limits: Constraints) -> Mapping[str, Any]:
        """Return what the plan must keep so that :meth:`step` needs nothing else, as JSON data.

        Args:
            graph: The model.
            config: The engineer's configuration (``ipu_config.json``), or ``None``.
            limits: Microbatches and replicas are read.
        """
        return limits.kept()

    def rules(self, graph: BlockGraph, machine: Machine, limits: Constraints) -> Constraints:
        """Return ``limits`` with what a plan must respect here besides.

        What ``check``, ``emit`` or ``launch`` would refuse is never planned.

        Raises:
            PartitionError: ``limits`` ask for what this backend cannot run.
        """
        return limits

    def default_microbatches(self, machine: Machine, num_stages: int | None, replicas: int) -> int:
        """Return the microbatches per step where the user gave no number."""
        ...

    def check_costs(self, costs: str) -> None:
        """Refuse a source of prices, before anything is measured.

        Raises:
            ValueError: It is neither ``analytic`` nor ``profiled``.
            PartitionError: This backend does not price blocks so.
        """
        if costs not in ("analytic", "profiled"):
            raise ValueError(f"costs {costs!r} is unknown; use 'analytic' or 'profiled'")

    def costs(self, work: Workload) -> GraphCosts:
        """Return the ways to run every block, each with seconds and bytes: the search's input."""
        from ipu_pipeline.planner.price import counted_costs

        return counted_costs(work)

    def placement(self, work: Workload) -> tuple[Partition, Workload] | None:
        """Return the split that the settings spell out, and its workload; ``None``: search one.

        Raises:
            PipelineError: It does not fit the model, the machine or its memory.
        """
        return None

    def search(
        self, work: Workload, limits: Constraints, *, any_replicas: bool
    ) -> tuple[Partition, Workload]:
        """Return the best split, and the workload that it is of.

        Args:
            work: What is to be split.
            limits: That a split must respect.
            any_replicas: The number of replicas may be chosen here; the batch stays as it is.

        Raises:
            PartitionError: There is none.
        """
        from ipu_pipeline.planner.price import step_s
        from ipu_pipeline.planner.search import solve_spread

        limits = self.rules(work.graph, work.machine, limits)
        logger.info("searching the best of %s over %d devices (%s)",
                    f"{limits.num_stages or 'all numbers of'} stages", len(work.machine.devices),
                    work.schedule)  # fmt: skip
        step = partial(step_s, work)

        def costs_of(graph: BlockGraph, measured_s: Mapping[str, Any]) -> GraphCosts:
            return self.costs(replace(work, graph=graph, measured_s=measured_s))

        whole = work.graph, work.measured_s
        return solve_spread(*whole, costs_of, work.machine, limits, step), work

    def step(self, plan: Plan) -> PlanPrice:
        """Return THE price of a plan: everything that one optimizer step costs, and the memory.

        It reads nothing but the plan, and prices plans that do not fit, too.
        """
        ...

    def lower(self, model: Any, plan: Plan, optimizer: Any, options: Any) -> Any:
        """Check ``plan`` and turn it into an executable.

        Raises:
            LoweringError: It cannot run here.
        """
        ...

    def doctor(self) -> tuple[str, str]:
        """Return ``ready`` or ``unavailable``, and why."""
        ...


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends, without importing one."""
    folders = [path.parent.name for path in sorted(_FOLDER.glob("*/backend.py"))]
    return (*folders, *(found.name for found in installed(GROUP)))


def backend_named(name: str) -> Backend:
    """Return a backend by its own name or by its ``target``.

    Raises:
        LoweringError: There is none.
    """
    if name in backend_names():
        return _load(name)
    known = [_load(other) for other in backend_names()]
    for backend in known:
        if name == backend.target:
            return backend
    raise LoweringError(
        f"target {name!r} is unknown; available: {', '.join(backend.target for backend in known)}"
    )


def backend_of(machine: Machine) -> Backend:
    """Return the backend that prices ``machine``.

    Raises:
        PlanError: The description names a backend that is not installed, or none fits it.
    """
    if machine.backend:
        if machine.backend not in backend_names():
            raise PlanError(
                f"machine {machine.name!r} is for backend {machine.backend!r}, which is not "
                f"installed; installed: {', '.join(backend_names())}"
            )
        return _load(machine.backend)
    for name in backend_names():
        if _load(name).prices_machine(machine):
            return _load(name)
    raise PlanError(
        f"no backend prices machine {machine.name!r}; name one in its field backend: "
        f"{', '.join(backend_names())}"
    )


def find_machine(machine: str | Machine, num_devices: int | None) -> Machine:
    """Return a described machine: a backend's own one, a known one, or a file's.

    Raises:
        PlanError: The name is unknown and no such file exists, or the file is wrong.
    """
    if isinstance(machine, Machine):
        return machine
    if machine in backend_names():
        own = _load(machine).own_machine(num_devices)
        if own is not None:
            return own
    return machine_by_name(machine)


@cache
def _load(name: str) -> Backend:
    if (_FOLDER / name / "backend.py").is_file():
        found: Backend = import_module(f"ipu_pipeline.backends.{name}.backend").BACKEND
        return found
    (point,) = (found for found in installed(GROUP) if found.name == name)
    backend: Backend = point.load()
    return backend
