"""What every rank holds: ``python -m benchmarks.rank_memory [--ranks 1 2 4] [--json]``.

A Llama-shaped model in float32 is saved in shards and trained for two steps by gloo processes with
one thread each: once built on ``meta``, so that a rank reads its own stage (``weights=folder``),
and once read whole by every rank (``from_pretrained``). Peaks are resident bytes of a process, what
it imports included; the files' pages that are mapped count, too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ipu_pipeline as ipp

SIZES = {"hidden_size": 1792, "intermediate_size": 7168, "num_attention_heads": 14,
         "num_key_value_heads": 14, "vocab_size": 16000}  # fmt: skip
WAYS = ("meta", "whole")


def worker(folder: str, way: str) -> None:
    """Train two steps in this process of torchrun; the first rank prints what all have used."""
    world = int(os.environ["WORLD_SIZE"])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 15000, (4, 64), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    begin_s = time.monotonic()
    on_meta = ipp.on_meta(folder)
    part = {name: value[:1] for name, value in batch.items()}
    machine = f"a100-80g-x{world}"
    plan = ipp.plan(on_meta, part, machine=machine, num_stages=world, microbatches=4)
    planned_s = time.monotonic()
    model = on_meta if way == "meta" else AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    options = {"weights": folder} if way == "meta" else {}
    target = ipp.compile(model, plan, target="distributed", optimizer=optimizer, **options)
    with target as executable:
        loaded_s = time.monotonic()
        losses = [executable.train_step(batch).loss for _ in range(2)]
        done_s = time.monotonic()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rank = dist.get_rank()
        own = {
            "predicted": plan.stages[rank].memory_bytes,
            "peak": peak,
            "load_s": loaded_s - planned_s,
            "plan_s": planned_s - begin_s,
            "steps_s": done_s - loaded_s,
            "losses": losses,
        }
        found: list[Any] = [None] * world
        dist.all_gather_object(found, own)
    if rank == 0:
        print(json.dumps(found), flush=True)


def measured(folder: str, ranks: int, way: str) -> list[dict[str, Any]]:
    """Return what every rank of a job has used."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
        str(ranks), "-m", "benchmarks.rank_memory", "--worker", folder, way,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{ranks} ranks, {way}: {done.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads(lines[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or run as one of the workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS,
                        help="whole takes a model's memory for every rank")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object a job")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        worker(*given.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=given.layers))
        size = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(folder, max_shard_size="200MB")
        del model
        print(f"{size / 1e9:.2f} GB of float32 weights; MB and seconds of the fullest rank")
        print("| ranks | weights | load s | peak | predicted | peak - predicted |")
        print("|---|---|---|---|---|---|")
        for ranks in given.ranks:
            for way in given.ways:
                found = measured(folder, ranks, way)
                if given.json:
                    print(json.dumps({"ranks": ranks, "way": way, "found": found}))
                full = max(found, key=lambda one: one["peak"])
                over = max(one["peak"] - one["predicted"] for one in found)
                load_s = max(one["load_s"] for one in found)
                row = f"| {ranks} | {way} | {load_s:.1f} | {full['peak'] / 1e6:.0f} "
                row += f"| {full['predicted'] / 1e6:.0f} | {over / 1e6:.0f} |"
                print(row, flush=True)


if __name__ == "__main__":
    main()
