"""How the solver's time grows: ``python -m benchmarks.solver_scaling [--large] [--models]``.

Prints seconds for chains of growing length and depth (with the ratio to ``n^2 x devices``),
for two parallel chains, and with ``--large`` for branchy graphs of 2,012 nodes and for graphs
with about 18,000 and 37,000 downward-closed sets in the form of the public max-load files.
Times are random but fixed by a seed; nothing here is read from a file. ``--models`` captures
published configurations of large models on ``meta`` and plans them for 16 devices, or refuses
them with what would help: seconds of the capture, of the prices and of the solver.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from benchmarks.max_load import HostedPositions, MaxLoadProblem
from benchmarks.solver_instances import Instance, solve_instance
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import Block, BlockGraph, TensorSpec
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, GraphCosts
from ipu_pipeline.planner.options.cost_models import estimate
from ipu_pipeline.planner.search import Constraints, Partition, solve
from ipu_pipeline.planner.search.problem import Slot, Value

MICROBATCHES = 256
AMPLE_BYTES = 10**12


def chains(lengths: Sequence[int], seed: int = 0) -> tuple[BlockGraph, GraphCosts]:
    """Parallel chains that meet in one last block; one length gives a plain chain."""
    rng = random.Random(seed)
    names = [[f"c{c}.{i}" for i in range(length)] for c, length in enumerate(lengths)]
    names[-1][-1] = "end"
    blocks = [name for chain in names for name in chain]
    tensors = []
    for chain in names:
        for first, second in zip(chain, [*chain[1:], "end"], strict=True):
            if first != "end":
                tensors.append(
                    TensorSpec(
                        first,
                        (4, 128, 768),
                        "float16",
                        requires_grad=True,
                        producer=first,
                        consumers=(second,),
                    )
                )
    costs = {}
    for name in blocks:
        forward = rng.uniform(0.8e-3, 1.2e-3)
        plain = BlockChoice(forward, 2 * forward, rng.randrange(8_000_000, 12_000_000), 1_000_000)
        again = BlockChoice(forward, 3 * forward, 800_000, 9_000_000, recompute=True)
        costs[name] = BlockCost((plain, again), {name: rng.randrange(20_000_000, 30_000_000)})
    layers = tuple(Block(name, kind="layer") for name in blocks)
    graph = BlockGraph("chains", layers, tuple(tensors))
    return graph, GraphCosts(costs, "random")


def machine(num_devices: int, memory_bytes: int) -> Machine:
    """Equal devices on one board."""
    devices = tuple(
        Device(f"d{i}", memory_bytes, {"float32": 1e12}, 1e12) for i in range(num_devices)
    )
    return Machine("scaling", devices, Link(64e9, 1e-6))


def timed(
    lengths: Sequence[int], num_devices: int, memory_bytes: int = AMPLE_BYTES
) -> tuple[float, Partition]:
    """Seconds to solve chains for a fixed depth, and the answer."""
    graph, costs = chains(lengths)
    where = machine(num_devices, memory_bytes)
    constraints = Constraints(num_stages=num_devices, num_microbatches=MICROBATCHES)
    start = perf_counter()
    partition = solve(graph, costs, where, constraints)
    return perf_counter() - start, partition


def branchy(num_ideals: int, num_nodes: int, num_devices: int, seed: int = 0) -> Instance:
    """Modules of four parallel branches in series, as in Inception, with about ``num_ideals``."""
    rng = random.Random(seed)
    lengths = (1, 2, 3, 3)
    per_module = 2 * 3 * 4 * 4
    if num_ideals > 60 * num_nodes:  # longer branches: more sets per node
        lengths, per_module = (5, 6, 7, 8), 6 * 7 * 8 * 9
    modules = max(1, round(num_ideals / per_module))
    preds: list[int] = [0]
    for _ in range(modules):
        root, ends = len(preds) - 1, 0
        for length in lengths:
            before = root
            for _ in range(length):
                preds.append(1 << before)
                before = len(preds) - 1
            ends |= 1 << before
        preds.append(ends)
    while len(preds) < num_nodes:
        preds.append(1 << (len(preds) - 1))
    return _max_load(preds, num_devices, rng)


def _max_load(preds: Sequence[int], num_devices: int, rng: random.Random) -> Instance:
    count = len(preds)
    work = [rng.expovariate(1.0) for _ in range(count)]
    readers = [0] * count
    for block, mask in enumerate(preds):
        for pred in range(count):
            if mask >> pred & 1:
                readers[pred] |= 1 << block
    problem = MaxLoadProblem(
        names=tuple(map(str, range(count))),
        preds=tuple(preds),
        options=tuple((BlockChoice(seconds),) for seconds in work),
        values=tuple(
            Value(block, mask, rng.expovariate(2.0)) for block, mask in enumerate(readers) if mask
        ),
        weight_bytes=tuple(rng.uniform(0, 2) for _ in range(count)),
        host_s=tuple(10 * seconds for seconds in work),
    )
    capacity = 1.3 * sum(problem.held) / num_devices
    slot = Slot(0, 0, capacity=capacity, link_in=Link(1.0), link_out=Link(1.0))
    return Instance(problem, HostedPositions((slot,) * num_devices, hosts=1), num_devices)


def tight_bytes(num_blocks: int, num_devices: int) -> int:
    """Memory in which the first stages must recompute almost everything, the last ones nothing."""
    return int(1.15 * (25_000_000 + 800_000 * num_devices) * num_blocks / num_devices)


def _print_chain_curve() -> None:
    print("one chain                  seconds: memory never binds / binds    ns per n^2 x devices")
    for length, devices in ((125, 8), (250, 16), (500, 32), (1000, 64)):
        loose, _ = timed((length,), devices)
        tight, found = timed((length,), devices, tight_bytes(length, devices))
        unit = 1e9 / (length**2 * devices)
        print(
            f"n={length:5} devices={devices:3}    {loose:8.3f} / {tight:8.3f}      "
            f"{loose * unit:8.2f} / {tight * unit:8.2f}    gap {found.gap:.1e}",
            flush=True,
        )


def _print_two_chains() -> None:
    print("two chains                 seconds: memory never binds / binds")
    for lengths, devices in (((50, 50), 4), ((100, 100), 8), ((200, 200), 16)):
        loose, found = timed(lengths, devices)
        text = f"{loose:8.3f}"
        if sum(lengths) <= 100:
            tight, found = timed(lengths, devices, tight_bytes(sum(lengths), devices))
            text += f" / {tight:8.3f}"
        print(f"{lengths} devices={devices:3}   {text}    gap {found.gap:.1e}", flush=True)


def _models() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Class and configuration of published models, by name; fields that differ from defaults."""
    llama = {"num_key_value_heads": 8, "vocab_size": 128_256, "use_cache": False}
    return {
        "Llama-70B": ("LlamaForCausalLM", "LlamaConfig", {
            **llama, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
            "num_attention_heads": 64}),
        "Llama-405B": ("LlamaForCausalLM", "LlamaConfig", {
            **llama, "hidden_size": 16_384, "intermediate_size": 53_248,
            "num_hidden_layers": 126, "num_attention_heads": 128}),
        "DeepSeek-V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {"use_cache": False}),
        "T5-XXL": ("T5ForConditionalGeneration", "T5Config", {
            "d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64,
            "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "use_cache": False}),
    }  # fmt: skip


def _print_models(sequence: int = 2048) -> None:
    import torch
    import transformers

    from ipu_pipeline.capture import capture

    print("model          blocks    capture / prices / solver seconds, 32 microbatches, 1F1B")
    for name, (model_class, config_class, options) in _models().items():
        start = perf_counter()
        with torch.device("meta"):
            config = getattr(transformers, config_class)(**options)
            model = getattr(transformers, model_class)(config).train()
            tokens = torch.zeros(1, sequence, dtype=torch.long)
        graph = capture(model, {"input_ids": tokens, "labels": tokens}).graph
        captured = perf_counter()
        for gigabytes in (80, 96):
            where = machine_by_name("a100-80g-x16")
            devices = tuple(
                replace(device, memory_bytes=gigabytes * 10**9) for device in where.devices
            )
            where = replace(where, devices=devices)
            before = perf_counter()
            costs = estimate(graph, where, loss_in_flight=1)
            priced = perf_counter()
            try:
                found = solve(graph, costs, where, Constraints(num_microbatches=32))
                text = f"{len(found.stages)} stages, gap {found.gap:.1e}"
            except PartitionError as error:
                text = str(error)
            print(f"{name:12} {len(graph.blocks):6}    {captured - start:6.2f} / "
                  f"{priced - before:5.2f} / {perf_counter() - priced:5.2f}   16 x {gigabytes} GB: "
                  f"{text}", flush=True)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the curves."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solver_scaling")
    parser.add_argument("--models", action="store_true", help="only: plan large models")
    parser.add_argument("--large", action="store_true", help="also the large branchy graphs")
    arguments = parser.parse_args(argv)
    if arguments.models:
        _print_models()
        return 0
    _print_chain_curve()
    _print_two_chains()
    for ideals, nodes in ((3_000, 2_012), (18_000, 96), (37_000, 326)) if arguments.large else ():
        instance = branchy(ideals, nodes, 6)
        start = perf_counter()
        search = solve_instance(instance)
        seconds = perf_counter() - start
        print(f"branchy, {instance.problem.num_blocks} nodes, about {ideals} sets, 6 devices: "
              f"{seconds:.2f} s, objective {search.objective:.6g}, "
              f"bound {search.lower_bound:.6g}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
