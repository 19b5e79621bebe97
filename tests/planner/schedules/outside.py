"""A schedule of another distribution, installed in a temporary folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MINE = '''
from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.kind import ScheduleKind
from ipu_pipeline.planner.schedules.objective import Objective


def rows(shape):
    """One microbatch at a time."""
    made = tuple(
        tuple(Action(s, kind, m) for m in range(shape.num_microbatches) for kind in "FB")
        for s in range(shape.num_stages)
    )
    return Schedule("one_by_one", shape.num_stages, shape.num_microbatches, made)


SCHEDULE = ScheduleKind(
    name="one_by_one",
    make_rows=rows,
    make_objective=lambda s: Objective.paced(0, s.num_microbatches, s.num_stages),
    any_devices=True,
)
'''


@contextmanager
def one_by_one(folder: Path) -> Iterator[str]:
    """Install it; its name is ``one_by_one``."""
    (folder / "mine_of_test.py").write_text(MINE)
    info = folder / "mine_of_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine_of_test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ipu_pipeline.schedules]\none_by_one = mine_of_test:SCHEDULE\n"
    )
    sys.path.insert(0, str(folder))
    try:
        yield "one_by_one"
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("mine_of_test", None)
