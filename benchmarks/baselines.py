"""The splits that other systems make, for comparison only. Each one cuts the execution order.

All return the blocks of every stage, none empty; how each stage runs (recomputation,
serialization) is then chosen by ``evaluate``, which favours them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.block_cost import GraphCosts

Split = tuple[tuple[str, ...], ...]


def even_layers(graph: BlockGraph, costs: GraphCosts, machine: Machine, num_stages: int) -> Split:
    """Equal numbers of layers; what precedes them with the first, the rest with the last.

    As optimum-graphcore's default and NeMo AutoModel do. Falls back to equal numbers of blocks
    where there are fewer layers than stages.
    """
    del costs, machine
    names = [block.name for block in graph.blocks]
    layers = [i for i, block in enumerate(graph.blocks) if block.kind == "layer"]
    if len(layers) < num_stages:
        return _cut(names, [len(names) * s // num_stages for s in range(1, num_stages)])
    firsts = [len(layers) * s // num_stages for s in range(1, num_stages)]
    return _cut(names, [layers[first] for first in firsts])


def even_parameters(
    graph: BlockGraph, costs: GraphCosts, machine: Machine, num_stages: int
) -> Split:
    """Cut where the running number of parameters is nearest to an even share."""
    del costs, machine
    total = [0, *accumulate(_parameters(graph))]
    cuts = []
    for stage in range(1, num_stages):
        share = total[-1] * stage / num_stages
        cuts.append(min(range(1, len(total)), key=lambda c: abs(total[c] - share)))
    return _cut([block.name for block in graph.blocks], cuts)


def size_threshold(
    graph: BlockGraph, costs: GraphCosts, machine: Machine, num_stages: int
) -> Split:
    """Close a stage before it exceeds an even share of the parameters (torch PiPPy's policy)."""
    del costs, machine
    sizes = _parameters(graph)
    threshold, filled, cuts = sum(sizes) / num_stages, 0, []
    for index, size in enumerate(sizes):
        if filled and filled + size > threshold and len(cuts) < num_stages - 1:
            cuts.append(index)
            filled = 0
        filled += size
    return _cut([block.name for block in graph.blocks], cuts, num_stages)


def partition_balanced(
    graph: BlockGraph, costs: GraphCosts, machine: Machine, num_stages: int
) -> Split:
    """Minimise the largest number of parameters of a stage (DeepSpeed's ``partition_balanced``)."""
    del costs, machine
    return _least_largest(graph, [float(size) for size in _parameters(graph)], num_stages)


def pipedream_chain(
    graph: BlockGraph, costs: GraphCosts, machine: Machine, num_stages: int
) -> Split:
    """Minimise the slowest of stages and transfers, memory apart (PipeDream's planner, SOSP 2019).

    One replica per stage; a transfer counts activation and gradient and overlaps compute.
    """
    seconds = [costs.blocks[block.name].plain.total_s for block in graph.blocks]
    total = [0.0, *accumulate(seconds)]
    count = len(seconds)
    link = machine.link
    sent = [2 * link.transfer_s(_crossing_bytes(graph, cut)) for cut in range(count + 1)]
    best = [total[stop] for stop in range(count + 1)]
    choices: list[list[int]] = []
    for stage in range(1, num_stages):
        ways = [
            min(
                ((max(best[cut], sent[cut], total[stop] - total[cut]), cut)
                 for cut in range(stage, stop)),
                default=(float("inf"), 0),
            )
            for stop in range(count + 1)
        ]  # fmt: skip
        best = [way[0] for way in ways]
        choices.append([way[1] for way in ways])
    cuts, stop = [], count
    for cut_at in reversed(choices):
        stop = cut_at[stop]
        cuts.append(stop)
    return _cut([block.name for block in graph.blocks], cuts[::-1])


BASELINES: Mapping[str, Callable[[BlockGraph, GraphCosts, Machine, int], Split]] = {
    "even layers": even_layers,
    "even parameters": even_parameters,
    "size threshold": size_threshold,
    "balanced": partition_balanced,
    "pipedream": pipedream_chain,
}


def _parameters(graph: BlockGraph) -> list[int]:
    return [
        sum(graph.parameter_by_fqn[fqn].numel for fqn in block.parameters) for block in graph.blocks
    ]


def _crossing_bytes(graph: BlockGraph, cut: int) -> int:
    index = graph.block_index
    return sum(
        tensor.num_bytes
        for tensor in graph.tensors
        if tensor.producer is not None
        and index[tensor.producer] < cut
        and any(index[name] >= cut for name in tensor.consumers)
    )


def _least_largest(graph: BlockGraph, weights: Sequence[float], num_stages: int) -> Split:
    """Contiguous parts whose largest weight is least, by bisection over the possible sums."""
    total = [0.0, *accumulate(weights)]
    sums = sorted({b - a for i, a in enumerate(total) for b in total[i + 1 :]})
    low = bisect_left(sums, 1, key=lambda limit: _greedy(weights, limit, num_stages) is not None)
    cuts = _greedy(weights, sums[low], num_stages) or []
    return _cut([block.name for block in graph.blocks], cuts, num_stages)


def _greedy(weights: Sequence[float], limit: float, num_stages: int) -> list[int] | None:
    cuts, filled = [], 0.0
    for index, weight in enumerate(weights):
        if weight > limit * (1 + 1e-12):
            return None
        if filled + weight > limit * (1 + 1e-12):
            cuts.append(index)
            filled = 0.0
        filled += weight
    return cuts if len(cuts) < num_stages else None


def _cut(names: Sequence[str], cuts: Sequence[int], num_stages: int | None = None) -> Split:
    """Stages between ``cuts``; cuts are moved apart or added so that no stage is empty."""
    depth = len(cuts) + 1 if num_stages is None else num_stages
    wanted = [*cuts, *[len(names)] * (depth - 1 - len(cuts))]
    placed: list[int] = []
    for number, cut in enumerate(wanted):
        first = placed[-1] + 1 if placed else 1
        placed.append(min(max(cut, first), len(names) - (depth - 1 - number)))
    bounds = [0, *placed, len(names)]
    return tuple(tuple(names[a:b]) for a, b in pairwise(bounds))
