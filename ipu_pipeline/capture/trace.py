"""Trace the glue: run the model once and record what happens between the leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ipu_pipeline.capture.leaves import Leaves
from ipu_pipeline.capture.meta import named_tensors
from ipu_pipeline.capture.tracer import Tracer


@dataclass(frozen=True)
class Trace:
    """A recorded run.

    Attributes:
        graph: The nodes in execution order; its output is a dict of the model's results.
        attributes: What ``call_module`` and ``get_attr`` targets stand for.
        inputs: Names of the batch's tensors, one placeholder each.
    """

    graph: fx.Graph
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]

    @property
    def results(self) -> Mapping[str, fx.Node]:
        """The model's results by name."""
        named = self.graph.output_node().args[0]
        assert isinstance(named, Mapping)
        return named  # type: ignore[return-value]


def trace(model: nn.Module, batch: Mapping[str, Any], leaves: Leaves) -> Trace:
    """Run ``model(**batch)`` once and record its glue.

    Raises:
        CaptureError: Something happens in the glue that cannot be replayed faithfully.
    """
    tracer = Tracer(model, leaves, kept=batch.values())
    inputs = [name for name, value in batch.items() if isinstance(value, Tensor)]
    for name in inputs:
        tracer.values.bind(batch[name], tracer.new_node("placeholder", name, meta_of=batch[name]))
    try:
        with tracer.patched(), tracer:
            output = model(**batch)
        tracer.check_constants()
        results = dict(named_tensors(output))
        end = tracer.graph.output({name: tracer.values.node_of(t) for name, t in results.items()})
        end.meta["after"] = tracer.storages.record(end, results.values(), [])
    finally:
        tracer.values.release()
    return Trace(tracer.graph, tracer.attributes, tuple(inputs))
