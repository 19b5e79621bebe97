"""A second, independent formulation: a mixed-integer program solved by HiGHS, to 30 blocks."""

from __future__ import annotations

import itertools
import random

import highspy
import pytest

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, GraphCosts
from ipu_pipeline.planner.search import Constraints, solve
from tests.planner.search.partition_oracle import make_graph, make_machine


def case(num_blocks, seed, *, streams):
    """Two choices per block, about half the memory that running plainly would need."""
    rng = random.Random(seed)
    edges = [(i - streams, i) for i in range(streams, num_blocks)]
    edges += [(p, c) for c in range(2, num_blocks) for p in range(c) if rng.random() < 1 / (4 * c)]
    graph = make_graph(num_blocks, edges, sizes=[rng.randint(1, 20) for _ in range(num_blocks)])
    costs = {}
    for i in range(num_blocks):
        f, stash = rng.randint(1, 9), rng.randint(50, 200)
        plain = BlockChoice(f, 2 * f, stash)
        again = BlockChoice(f, 3 * f, stash // 5, recompute=True)
        costs[f"b{i}"] = BlockCost((plain, again), {f"w{i}": rng.randint(10, 90)})
    return graph, GraphCosts(costs, "random")


class Program:
    """``done[b, s]``: block b is in one of the stages 0..s; ``redo[b, s]``: b recomputes in s."""

    def __init__(self, graph, costs, num_stages, num_microbatches, bandwidth):
        self.graph, self.costs, self.bandwidth = graph, costs, bandwidth
        self.names = [block.name for block in graph.blocks]
        self.stages, self.last = range(num_stages), num_stages - 1
        self.microbatches = num_microbatches
        self.model = highspy.Highs()
        for option, value in (("output_flag", False), ("mip_rel_gap", 0.0), ("threads", 1)):
            self.model.setOptionValue(option, value)
        new = self.model.addBinary
        self.done = {(b, s): new() for b in self.names for s in range(self.last)}
        self.redo = {(b, s): new() for b in self.names for s in self.stages}
        self.crossing = {
            (t.name, s): self.model.addVariable(0, 1) for t in graph.tensors
            for s in range(self.last)
        }  # fmt: skip

    def here(self, b, s):
        def through(stage):
            return 0 if stage < 0 else 1 if stage >= self.last else self.done[b, stage]

        return through(s) - through(s - 1)

    def order(self):
        for b in self.names:
            for s in range(1, self.last):
                self.model.addConstr(self.done[b, s - 1] <= self.done[b, s])
            for s in self.stages:
                self.model.addConstr(self.redo[b, s] <= self.here(b, s))
        for s in self.stages:
            self.model.addConstr(sum(self.here(b, s) for b in self.names) >= 1)
        for tensor in self.graph.tensors:
            for consumer, s in itertools.product(tensor.consumers, range(self.last)):
                gap = self.done[tensor.producer, s] - self.done[consumer, s]
                self.model.addConstr(gap <= self.crossing[tensor.name, s])
                self.model.addConstr(gap >= 0)

    def load(self, s):
        total = 0
        for b in self.names:
            plain, again = self.costs.blocks[b].choices
            total = total + plain.total_s * self.here(b, s)
            total = total + (again.total_s - plain.total_s) * self.redo[b, s]
        for tensor in self.graph.tensors:
            for edge in {s - 1, s} & set(range(self.last)):
                send = 2 * tensor.num_bytes / self.bandwidth
                total = total + send * self.crossing[tensor.name, edge]
        return total

    def memory(self, s):
        total, flight = 0, min(self.last + 1 - s, self.microbatches)
        for b in self.names:
            plain, again = self.costs.blocks[b].choices
            weights = sum(self.costs.blocks[b].weight_bytes.values())
            total = total + (flight * plain.stash_bytes + weights) * self.here(b, s)
            saved = flight * (plain.stash_bytes - again.stash_bytes)
            total = total - saved * self.redo[b, s]
        for tensor in self.graph.tensors if s else ():
            total = total + flight * tensor.num_bytes * self.crossing[tensor.name, s - 1]
        return total

    def optimum(self, capacity):
        """Least step time, or ``None`` when nothing fits."""
        self.order()
        busiest = self.model.addVariable(0)
        loads = [self.load(s) for s in self.stages]
        for s, load in enumerate(loads):
            self.model.addConstr(self.memory(s) <= capacity)
            self.model.addConstr(load <= busiest)
        self.model.minimize((self.microbatches - 1) * busiest + sum(loads))
        if self.model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        return self.model.getInfo().objective_function_value


def tight_bytes(costs, num_stages):
    """Room for the weights and about half of the plain stash of an even split."""
    stash = sum(cost.plain.stash_bytes for cost in costs.blocks.values())
    weights = sum(sum(cost.weight_bytes.values()) for cost in costs.blocks.values())
    return int(0.5 * stash * (num_stages + 1) / 2 / num_stages + 1.1 * weights / num_stages + 400)


@pytest.mark.parametrize(
    ("num_blocks", "num_stages", "streams", "seed"),
    [(10, 3, 1, 0), (10, 2, 2, 1), (14, 3, 2, 2), (20, 3, 1, 3), (20, 2, 2, 4), (30, 2, 1, 5),
     (30, 3, 1, 6), (30, 4, 1, 7), (16, 4, 1, 9), (12, 3, 2, 10),
     pytest.param(24, 4, 2, 8, marks=pytest.mark.acceptance)],  # more than all others together
)  # fmt: skip
def test_optimum_equals_the_integer_program(num_blocks, num_stages, streams, seed):
    graph, costs = case(num_blocks, seed, streams=streams)
    capacity, bandwidth = tight_bytes(costs, num_stages), 40.0
    expected = Program(graph, costs, num_stages, 8, bandwidth).optimum(capacity)
    machine = make_machine(num_stages, memory=capacity, bandwidth=bandwidth)
    constraints = Constraints(num_stages=num_stages, num_microbatches=8)
    if expected is None:
        with pytest.raises(PartitionError):
            solve(graph, costs, machine, constraints)
        return
    found = solve(graph, costs, machine, constraints)
    assert found.objective == pytest.approx(expected, rel=1e-6)
    assert found.gap == 0.0
    assert any(stage.recompute for stage in found.stages)  # memory matters in every case
