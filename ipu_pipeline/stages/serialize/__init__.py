"""Large tables in slices: lookups, projections and losses, for every target that runs torch."""

from ipu_pipeline.stages.serialize.forward import SerializedForward
from ipu_pipeline.stages.serialize.gradients import GradientSum, add_gradient, add_sums
from ipu_pipeline.stages.serialize.spread import Share, spread_tables
from ipu_pipeline.stages.serialize.tables import (
    Table,
    TableUses,
    check_blocks,
    find_tables,
    fused_projections,
    serialized,
)

__all__ = [
    "GradientSum",
    "SerializedForward",
    "Share",
    "Table",
    "TableUses",
    "add_gradient",
    "add_sums",
    "check_blocks",
    "find_tables",
    "fused_projections",
    "serialized",
    "spread_tables",
]
