"""Split a model into pipeline stages: exact, memory-aware, with a bound on what is possible.

``solve`` finds the split; ``Constraints.with_stages`` fixes one that somebody else chose. Neither
needs torch.

Read the files in this order:

1. ``constraints.py``, ``result.py``: what goes in and what comes out.
2. ``problem.py``: the problem on integers (blocks are bits); ``from_graph.py`` makes it.
3. ``objective.py``: the closed forms of the schedules that the search minimises.
4. ``stage_price.py``: one stage: transfers and memory; ``knapsack.py``: the exact choice of
   recomputation and serialization per block.
5. ``ideals.py``: the boundaries that a pipeline may have (order ideals of the blocks).
6. ``bottleneck.py`` over ``stage_costs.py``: the fast exact search, a dynamic program over ideals.
7. ``label_setting.py``: the exact search for shared devices and memories and other schedules;
   ``priced.py`` drives it over pipelines whose stages a backend prices itself.
8. ``parallel.py``, ``pipeline_search.py``: what to try, with which search.
9. ``step_bound.py``: the proven bound of the schedule's exact replay.
10. ``solver.py``, ``infeasible.py`` with ``least_bytes.py``: the best split, or what would help.
11. ``given_split.py``: the stages of a plan, priced as they are annotated.
"""

from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.infeasible import Change, InfeasibleError
from ipu_pipeline.planner.search.result import Partition, StageAssignment
from ipu_pipeline.planner.search.solver import solve

__all__ = [
    "Change",
    "Constraints",
    "InfeasibleError",
    "Partition",
    "StageAssignment",
    "solve",
]
