"""Say which blocks let their activations wait for the backward pass in host memory.

Changes: ``offload`` of every stage.
Requires: GPUs when it runs; blocks that keep nothing from forward to backward are left plain.
Guarantees: exactly the chosen blocks offload, in execution order. ``auto`` keeps the plan's own
    choice, ``all`` and ``none`` say so for every block. The price is that of the plan without it:
    no description of a machine says how fast its host is.

::

    before: 0: embeddings .. layer.5
    pass:   offload{blocks=[encoder.layer.*]}
    after:  0: embeddings .. layer.5 (6 offloaded); offloaded: encoder.layer.0-5 (stage 0)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ipu_pipeline.planner.passes.recompute import Recompute


@dataclass(frozen=True)
class Offload(Recompute):
    """Choose the blocks that offload; as for those that recompute, with which it composes."""

    name: ClassVar[str] = "offload"


PASS = Offload
