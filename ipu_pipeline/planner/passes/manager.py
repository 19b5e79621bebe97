"""Runs passes over a plan, with the verifier before the first and behind each."""

from __future__ import annotations

from dataclasses import dataclass

from ipu_pipeline.errors import PlanError, VerifyError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.verify import verify_plan
from ipu_pipeline.planner.passes.base import Pass, pass_text
from ipu_pipeline.planner.passes.default_order import in_default_order
from ipu_pipeline.planner.passes.options import parse_passes
from ipu_pipeline.planner.passes.registry import make_pass


@dataclass(frozen=True)
class PassManager:
    """Passes in the order in which they run.

    Attributes:
        passes: The passes.
    """

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str) -> PassManager:
        """Read ``serialize_embedding{factor=4},recompute{blocks=[a,b]}``.

        The passes run in the default order (``default_order.py``), not in the written one.

        Raises:
            ValueError: The text has another form, or a pass or an option is unknown or wrong.
        """
        return cls(in_default_order(make_pass(*found) for found in parse_passes(text)))

    def __str__(self) -> str:
        return ",".join(map(pass_text, self.passes))

    def run(self, plan: Plan) -> Plan:
        """Return ``plan`` with the annotations of all passes; its predictions are left alone.

        Raises:
            PlanError: ``plan`` is invalid, or a pass cannot be applied to it.
            VerifyError: A pass left an invalid plan behind.
        """
        verify_plan(plan)
        for one in self.passes:
            plan = one.run(plan)
            try:
                verify_plan(plan)
            except PlanError as error:
                raise VerifyError(
                    f"pass {pass_text(one)} left an invalid plan: {error}; this is a bug in the "
                    "pass, not in the plan"
                ) from error
        return plan
