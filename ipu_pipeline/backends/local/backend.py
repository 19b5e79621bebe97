"""This machine, in one process: every stage a thread, one shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.backend import Backend
from ipu_pipeline.planner.price import PlanPrice, replayed_price, workload_of
from ipu_pipeline.planner.schedules import schedule_names


@dataclass(frozen=True)
class LocalBackend(Backend):
    """Stages are threads of this process."""

    name: str = "local"
    target: str = "local"

    @property
    def schedules(self) -> tuple[str, ...]:
        """All; a split backward pass is computed whole, by its first half."""
        return schedule_names()

    def own_machine(self, num_devices: int | None) -> Machine:
        """Measure this machine; ``None``: one device for every thread of torch."""
        import torch

        from ipu_pipeline.backends.local.measure import local_machine

        return local_machine(num_devices or max(1, torch.get_num_threads()))

    def prices_machine(self, machine: Machine) -> bool:
        """Whether the devices are threads of one process."""
        return machine.shared_memory

    def default_microbatches(self, machine: Machine, num_stages: int | None, replicas: int) -> int:
        """Eight, which keeps a few stages busy."""
        return 8

    def step(self, plan: Plan) -> PlanPrice:
        """Replay the schedule over the stages."""
        return replayed_price(plan, self.costs(workload_of(plan)))

    def lower(self, model: Any, plan: Plan, optimizer: Any, options: Any) -> Any:
        """Return an executable in this process."""
        from ipu_pipeline.backends.local.executable import LocalExecutable

        return LocalExecutable(model, plan, optimizer, options)

    def doctor(self) -> tuple[str, str]:
        """It always runs."""
        return "ready", "stages are threads of this process"


BACKEND = LocalBackend()
