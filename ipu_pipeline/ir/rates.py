"""What a plan trains per second: samples, tokens, and the share of its GPUs' peak."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan

_PEAK = "bfloat16"  # MFU is counted against it, whatever the precision


@dataclass(frozen=True)
class Rates:
    """Rates of one plan.

    Attributes:
        num_devices: Devices that work for it, all replicas together.
        samples_per_s: Of all replicas.
        tokens_per_s: The same; ``None``: the model's input is no text.
        mfu: Model FLOPs (without recomputation, attention counted whole) per second, as a share
            of the devices' bfloat16 peak; ``None``: they are no GPUs.
    """

    num_devices: int
    samples_per_s: float
    tokens_per_s: float | None
    mfu: float | None

    def text(self) -> str:
        """Return the rates as words."""
        parts = [f"{self.samples_per_s:,.1f} samples/s"]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.1%} {of_peak(self.num_devices)}")
        return ", ".join(parts)


def of_peak(num_devices: int) -> str:
    """Say what an MFU is a share of."""
    return f"of {count_of(num_devices, 'GPU')}'{'s' if num_devices == 1 else ''} bfloat16 peak"


def rates_of(plan: Plan, step_s: float | None = None) -> Rates | None:
    """Return a plan's rates; ``None`` where its step takes no time.

    Args:
        plan: The plan.
        step_s: Seconds of an optimizer step; ``None``: those that the plan predicts.
    """
    seconds = plan.objective_s if step_s is None else step_s
    if seconds <= 0:
        return None
    per_stage = prod(_count(plan, name) for name in ("tp", "cp"))
    gpu = plan.machine.devices[0].kernels is not None
    num_devices = len({s.device for s in plan.stages}) * plan.replicas * per_stage
    tokens = tokens_per_sample(plan.graph)
    samples_per_s = plan.total_batch_size / seconds
    return Rates(
        num_devices,
        samples_per_s,
        None if tokens is None else tokens * samples_per_s,
        _model_flops(plan) / seconds / num_devices / _peak(plan) if gpu else None,
    )


def tokens_per_sample(graph: BlockGraph) -> int | None:
    """Return the tokens of one sample of text, those of the decoder if there is one."""
    found = {spec.name: spec.shape for spec in graph.inputs if spec.name.endswith("input_ids")}
    shape = found.get("decoder_input_ids") or found.get("input_ids")
    return None if shape is None or not shape[0] else prod(shape[1:])


def _count(plan: Plan, name: str) -> int:
    found = plan.settings.get(name, 1)
    return found if isinstance(found, int) else 1


def _model_flops(plan: Plan) -> float:
    blocks = plan.graph.blocks
    once = sum(b.forward_flops + (b.backward_flops if plan.graph.training else 0) for b in blocks)
    return float(once * plan.num_microbatches * plan.replicas)


def _peak(plan: Plan) -> float:
    rates = plan.machine.devices[0].flops_per_s
    return rates.get(_PEAK, rates["float32"])
