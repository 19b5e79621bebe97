"""Split a model into pipeline stages: exact, memory-aware, with a bound on what is possible."""

from ipu_pipeline.partition.constraints import Constraints
from ipu_pipeline.partition.evaluate import evaluate
from ipu_pipeline.partition.infeasible import solve
from ipu_pipeline.partition.result import Partition, StageAssignment

__all__ = ["Constraints", "Partition", "StageAssignment", "evaluate", "solve"]
