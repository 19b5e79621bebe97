"""Tokens per second of generation: ``python -m benchmarks.generation [--json]``.

A Llama-shaped model in float32 generates greedily for 8 prompts of different lengths. Compared, in
turns, on the same cores: the model alone in one process with a thread per core (every prompt by
itself, and all of one length in one batch), and two processes of one thread with a stage each
(``generate_parts`` with all prompts in flight, and with two batches of four).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import ipu_pipeline as ipp

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
         "num_key_value_heads": 4, "num_hidden_layers": 12, "vocab_size": 16000}  # fmt: skip
NEW, PROMPTS = 32, 8
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def prompts() -> list[dict[str, torch.Tensor]]:
    """Return prompts of 9 to 16 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(5, 15000, (1, 9 + n), generator=generator)}
        for n in range(PROMPTS)
    ]


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Return so many batches of prompts of one length."""
    ids = torch.randint(5, 15000, (PROMPTS, 12), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": part} for part in ids.chunk(count)]


def rates(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the tokens per second of every way, one number a round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, call in ways.items():
            begin_s = time.perf_counter()
            call()
            if turn:  # the first one warms up
                found[name].append(PROMPTS * NEW / (time.perf_counter() - begin_s))
    return found


def model() -> LlamaForCausalLM:
    """Return the model."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def worker(way: str, rounds: int) -> None:
    """Generate in this process: ``alone``, or as a rank."""
    own = model()
    if way == "alone":
        torch.set_num_threads(os.cpu_count() or 1)
        print(json.dumps(rates({
            "alone, one by one": lambda: [own.generate(**p, **OPTIONS) for p in prompts()],
            "alone, one batch": lambda: own.generate(**batches(1)[0], **OPTIONS),
        }, rounds)))  # fmt: skip
        return
    world = int(os.environ["WORLD_SIZE"])
    plan = ipp.plan(own, prompts()[0], machine="h100-x8", num_stages=world, microbatches=world)
    with ipp.compile(own, plan, target="distributed", training=False) as made:
        found = rates({
            "in flight, one by one": lambda: made.generate_parts(prompts(), **OPTIONS),
            "in flight, two batches": lambda: made.generate_parts(batches(2), **OPTIONS),
            "one batch": lambda: made.generate(**batches(1)[0], **OPTIONS),
        }, rounds)  # fmt: skip
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)


def measured(way: str, ranks: int, rounds: int) -> dict[str, list[float]]:
    """Return the rates of one job."""
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [
        sys.executable, *(launched if way == "ranks" else []),
        "-m", "benchmarks.generation", "--worker", way, "--rounds", str(rounds),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    found: dict[str, list[float]] = json.loads(lines[-1])
    return found


def main() -> None:
    """Measure both jobs in turns and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=2, help="stages, each a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.rounds)
        return
    found = {**measured("alone", 1, given.rounds), **measured("ranks", given.ranks, given.rounds)}
    if given.json:
        print(json.dumps(found))
        return
    for name, values in found.items():
        print(f"{name:26} {statistics.median(values):8.1f} tokens/s  "
              f"({min(values):.1f} to {max(values):.1f})")  # fmt: skip


if __name__ == "__main__":
    main()
