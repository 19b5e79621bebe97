"""Split a model into pipeline stages: exact, memory-aware, with a bound on what is possible.

``solve`` finds the split, ``evaluate`` prices one that somebody else chose. Neither needs torch.

Read the files in this order:

1. ``constraints.py``, ``result.py``: what goes in and what comes out.
2. ``problem.py``: the problem on integers (blocks are bits); ``from_graph.py`` makes it.
3. ``objective.py``: seconds per optimizer step under 1F1B, GPipe and PopART, with sources.
4. ``stage_price.py``: one stage: transfers, memory, and the exact choice of recomputation and
   serialization per block.
5. ``ideals.py``: the boundaries that a pipeline may have (order ideals of the blocks).
6. ``bottleneck.py`` over ``stage_costs.py``: the fast exact search, a dynamic program over ideals.
7. ``label_setting.py``: the exact search for shared devices and memories and other schedules.
8. ``parallel.py``, ``pipeline_search.py``: what to try, with which search.
9. ``solver.py``, ``infeasible.py``, ``given_split.py``: answers, refusals, splits chosen elsewhere.
10. ``priced.py``: pipelines whose stages a backend prices itself.
"""

from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.given_split import evaluate
from ipu_pipeline.planner.search.infeasible import Change, InfeasibleError
from ipu_pipeline.planner.search.result import Partition, StageAssignment
from ipu_pipeline.planner.search.solver import solve

__all__ = [
    "Change",
    "Constraints",
    "InfeasibleError",
    "Partition",
    "StageAssignment",
    "evaluate",
    "solve",
]
