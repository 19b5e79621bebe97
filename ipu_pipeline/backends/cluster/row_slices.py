"""Tables of a vocabulary that is spread over stages: a rank has its rows of them, and no others.

A parameter stays the same object and becomes its rows: optimizers, sums over replicas and
checkpoints know it as a slice. While the whole model is looked at (captures, losses), it is a
stand-in of the whole shape, the same on all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ipu_pipeline.backends.cluster.cut_plan import Cuts, refuse_whole_tensors
from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.backends.cluster.ranks.rendezvous import gather_over
from ipu_pipeline.checkpoint.slices import Slices
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.options.vocabulary import lookups, spread_head
from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.stages.materialize import stand_in


@dataclass(frozen=True)
class RowPlan:
    """Which tables are cut, and where their rows are.

    Attributes:
        tables: Names of the tables.
        biases: Names of the vectors with one number for each row of the head's table, which are
            whole on all ranks with rows.
        head: Name of the head's table.
        looking_up: Positions in the pipeline that look up in one of them.
        rows: First row and the one behind the last of every position with rows.
        size: Rows of a whole table.
        last: Position of the loss.
    """

    tables: tuple[str, ...]
    biases: tuple[str, ...]
    head: str
    looking_up: tuple[int, ...]
    rows: Mapping[int, tuple[int, int]]
    size: int
    last: int


def row_plan(plan: Plan, positions: Sequence[int]) -> RowPlan | None:
    """Return what a plan spreads; ``positions`` are those of the stages in the pipeline.

    A process holds as many rows as its stages together, in one run.
    """
    if plan.vocabulary is None:
        return None
    graph, head = plan.graph, spread_head(plan.graph)
    found = lookups(graph, head)
    counts: Counter[int] = Counter()
    for stage, first, end in plan.vocabulary.rows:
        counts[positions[stage]] += end - first
    ends = list(accumulate(counts[position] for position in sorted(counts)))
    rows = dict(zip(sorted(counts), pairwise([0, *ends]), strict=True))
    size = plan.vocabulary.size
    biases = [n for n in head.head.parameters if graph.parameter_by_fqn[n].shape == (size,)]
    return RowPlan(
        tuple(dict.fromkeys([head.table.parameter, *found.values()])),
        tuple(biases),
        head.table.parameter,
        tuple(sorted({positions[plan.stage_of[name]] for name in found})),
        rows,
        size,
        positions[-1],
    )


@dataclass(frozen=True)
class _RowCuts(Cuts):
    tables: frozenset[int]

    what = "a vocabulary that is spread over stages"
    remedy = "plan without vocabulary"

    def is_cut(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self.tables


def refuse_with_rows(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None,
    options: ExecutionOptions,
    device: torch.device,
    layout: Layout,
) -> None:
    """Refuse what does not go with a vocabulary that is spread over processes.

    Raises:
        LoweringError: There is some.
    """
    rows = row_plan(plan, layout.positions)
    if rows is None:
        return
    refused = {
        f"tensor parallelism (tp {layout.tp}) cuts": layout.tp > 1,
        "replicated_tensor_sharding divides the state of": (
            options.replicated_tensor_sharding and layout.num_replicas > 1
        ),
        "compile_blocks takes the calls that read": options.compile_blocks,
        f"devices of type {device.type} do not exchange rows of": device.type != "cpu",
    }
    for what, wanted in refused.items():
        if wanted:
            raise LoweringError(
                f"{what} tables whose rows are spread over processes; leave it out, or plan "
                "without vocabulary"
            )
    if optimizer is not None:
        named = dict(model.named_parameters(remove_duplicate=False))
        cuts = _RowCuts(frozenset(id(named[name]) for name in rows.tables))
        refuse_whole_tensors(optimizer, cuts, master_weights=options.master_weights)


class RowSlices(Slices):
    """The rows that this rank has.

    Args:
        model: Its tables become their rows.
        optimizer: What it keeps already becomes its part, too.
        plan: Which.
        groups: Of the pipeline.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        plan: RowPlan,
        groups: Groups,
    ) -> None:
        self._model, self._plan, self._groups = model, plan, groups
        self._shapes: dict[int, torch.Size] = {}
        self._aside: dict[int, Tensor] = {}  # rows, while there are stand-ins
        self._is_whole = False
        self.rows = plan.rows.get(groups.layout.position)
        named = dict(model.named_parameters(remove_duplicate=False))
        self.tables = {id(named[name]): named[name] for name in plan.tables}
        self.cut(optimizer)

    @property
    def cuts(self) -> bool:
        """Whether any tensor of the job is cut."""
        return True

    def cut(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Cut the tables, and what an optimizer keeps of them, where they are whole."""
        self._is_whole = False
        if self.rows is None:
            return
        for key, table in self.tables.items():
            if key in self._shapes:
                continue
            whole, gradient = table.data, table.grad
            self._shapes[key] = whole.shape
            state = {} if optimizer is None else optimizer.state.get(table, {})
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = self.part(table, value)
            table.grad = None
            table.data = self.part(table, whole)
            if gradient is not None:
                table.grad = self.part(table, gradient)

    def is_cut(self, tensor: Tensor) -> bool:
        """Whether rows of a parameter are here, and not all of it."""
        return id(tensor) in self._shapes

    def shape(self, tensor: Tensor) -> torch.Size:
        """Return the shape of a parameter or buffer as a whole."""
        return self._shapes.get(id(tensor), tensor.shape)

    def part(self, of: Tensor, whole: Tensor) -> Tensor:
        """Return this rank's rows of ``whole``, in memory of their own."""
        if self.rows is None or whole.shape != self._shapes.get(id(of)):
            return whole
        return whole[self.rows[0] : self.rows[1]].clone(memory_format=torch.contiguous_format)

    def whole(self, of: Tensor, part: Tensor) -> Tensor:
        """Return all rows, on the rank that writes them; all ranks with rows call this."""
        return self._joined(part, [self._owner]) if self._is_rows(of, part) else part

    def placeholder(self, of: Tensor) -> Tensor:
        """Return what transformers reads a whole table for, of which rows are kept then."""
        return of.new_empty(self.shape(of), device="meta") if self.is_cut(of) else of

    def writes(self, of: Tensor) -> bool:
        """Whether this rank writes a tensor of which several have a part."""
        return not self.is_cut(of) or self._groups.layout.position == self._owner

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a state dict of whole tensors; all ranks of the pipeline call this."""
        if self._is_whole:
            return model.state_dict()
        state = model.state_dict(keep_vars=True)
        every = list(range(self._groups.layout.num_ranks))
        whole = {key: self._joined(table.data, every) for key, table in self.tables.items()}
        return {
            n: whole.get(id(t), t).detach() if isinstance(t, Tensor) else t
            for n, t in state.items()
        }

    def undo(self, optimizer: torch.optim.Optimizer | None, *, gather: bool) -> None:
        """Give the tables, and what an optimizer keeps of them, their whole values.

        Without ``gather`` they stay rows.
        """
        if not gather or self._is_whole:
            return
        self._is_whole = True
        every = list(range(self._groups.layout.num_ranks))
        for table in self.tables.values():
            state = {} if optimizer is None else optimizer.state.get(table, {})
            own = [n for n, v in state.items() if self._is_rows(table, v)]
            told = gather_over(self._groups.pipeline, own, list[str], self._groups.device)
            names = list(dict.fromkeys(name for theirs in told for name in theirs))
            found = {n: self._joined(state.get(n, table.data), every) for n in names}
            has_gradient = self._groups.any_true([table.grad is not None], self._groups.pipeline)[0]
            value = self._joined(table.data, every)
            gradient = None
            if has_gradient:
                like = table.data if table.grad is None else table.grad
                gradient = self._joined(like, every)
            table.grad = None
            table.data, table.grad = value, gradient
            if self.rows is not None:
                state.update({n: v for n, v in found.items() if n in own})
        self._shapes.clear()

    def rows_of(self, table: nn.Parameter) -> Tensor:
        """Return the rows of a table that are here, at any time and in any thread."""
        return self._aside.get(id(table), table.data)

    @contextmanager
    def whole_stand_ins(self) -> Iterator[None]:
        """Within it, the tables have their whole shapes, and values that mean nothing."""
        before = [(table, table.data, table.grad) for table in self.tables.values()]
        aside = self._aside or {id(table): data for table, data, _ in before}
        outer, self._aside = self._aside, aside
        for table, data, _ in before:
            table.grad = None
            table.data = stand_in(data.new_empty(self.shape(table), device="meta")).to(data.device)
        try:
            yield
        finally:
            for table, data, gradient in before:
                table.grad = None
                table.data, table.grad = data, gradient
            self._aside = outer

    @property
    def _owner(self) -> int:
        return min(self._plan.rows)

    def _is_rows(self, of: Tensor, part: object) -> bool:
        return isinstance(part, Tensor) and self.is_cut(of) and part.shape == of.shape

    def _joined(self, part: Tensor, readers: Sequence[int]) -> Tensor:
        """Send the rows of all positions to ``readers``; return them there, elsewhere the part.

        Those with rows and the readers call this.
        """
        groups, here = self._groups, self._groups.layout.position
        shape = (self._plan.size, *part.shape[1:])
        whole = part.new_empty(shape) if here in readers else part
        works = []
        for position, (first, end) in sorted(self._plan.rows.items()):
            for reader in readers:
                if here == position == reader:
                    whole[first:end] = part
                elif here == reader:
                    rows = whole[first:end]
                    works.append(dist.irecv(rows, group=groups.pipeline, group_src=position))
                elif here == position:
                    own = part.detach().contiguous()
                    works.append(dist.isend(own, group=groups.pipeline, group_dst=reader))
        for work in works:
            assert work is not None
            groups.waiter.run(work.wait)
        return whole
