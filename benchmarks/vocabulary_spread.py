"""A vocabulary spread over processes, against the best splits of whole blocks.

    python -m benchmarks.vocabulary_spread [--vocabulary 262144] [--processes 2] [--rounds 5]
        [--json]

A GPT-2 with tied tables is trained by gloo processes with one thread each: under our split of
whole blocks, by profiled costs; the same with its projection and loss in slices, which hold no
whole logits; and with the vocabulary spread evenly. All three step in every round, by turns first.
Peaks of resident memory are those of jobs of their own, what Python and torch take without a model
left out: of the whole run, with all that is looked at before the first step by default, and of the
third and fourth step alone, when nothing is captured any more. They do not depend on how busy the
machine is: ``--rounds 0`` measures them only. Before anything is timed all must have the same loss.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import ipu_pipeline as ipp
from benchmarks.processes import everyones, interleaved, is_started, ratio
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.ir.plan import Plan

MODULE = "benchmarks.vocabulary_spread"
WAYS: dict[str, dict[str, Any]] = {
    "whole blocks": {},
    "whole blocks, loss in slices": {"passes": "serialize_projection{factor=8}"},
    "spread": {"vocabulary": "even"},
}


def build(arguments: argparse.Namespace, samples: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model, the same every time, and a batch."""
    config = transformers.GPT2Config(
        vocab_size=arguments.vocabulary, n_embd=arguments.hidden, n_layer=arguments.layers,
        n_head=arguments.hidden // 64, n_positions=arguments.seq_length, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return from_config(
        config, "causal-lm", batch_size=samples, seq_length=arguments.seq_length, device="cpu"
    )


def make_plans(folder: Path, arguments: argparse.Namespace) -> None:
    """Plan and write what the processes will run: one split of blocks, by profiled costs."""
    model, example = build(arguments, arguments.micro_batch)
    for way, options in WAYS.items():
        made = ipp.plan(
            model, example, num_stages=arguments.processes, microbatches=arguments.microbatches,
            costs="profiled" if arguments.rounds else "analytic", **options,
        )  # fmt: skip
        made.save(folder / f"{way}.json")


def compiled(
    way: str, arguments: argparse.Namespace, *, checked: bool
) -> tuple[Any, dict[str, Tensor]]:
    """Return this process's executable and the batch; ``checked``: with all that is by default."""
    samples = arguments.micro_batch * arguments.microbatches
    model, batch = build(arguments, samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    plan = Plan.load(Path(arguments.plans) / f"{way}.json")
    options: dict[str, Any] = {} if checked else {
        "self_check": False, "loss_weights": "samples", "batch_axes": dict.fromkeys(batch, 0),
    }  # fmt: skip
    return ipp.compile(model, plan, target="distributed", optimizer=optimizer, **options), batch


def memory(way: str, arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """Return the bytes that each process has taken at most: in all, and in later steps."""
    dist.barrier()
    before = _peak()
    made, batch = compiled(way, arguments, checked=True)
    with made:
        for _ in range(2):
            made.train_step(batch)
        all_of_it = _peak() - before
        Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
        for _ in range(2):
            made.train_step(batch)
        return everyones((all_of_it, _peak() - before))


def _peak() -> int:
    """Return the peak of resident memory since the process began, or a new peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return seconds per step of all ways, and the ratios of rounds."""
    with contextlib.ExitStack() as stack:
        steps: dict[str, Callable[[], object]] = {}
        losses = {}
        for way in WAYS:
            made, batch = compiled(way, arguments, checked=False)
            stack.enter_context(made)
            losses[way] = made.train_step(batch).loss
            steps[way] = partial(made.train_step, batch)
        if max(losses.values()) / min(losses.values()) > 1 + 1e-5:
            raise SystemExit(f"the ways are not the same: losses {losses}")
        times = interleaved(steps, arguments.rounds, warmup=1)
    samples = arguments.micro_batch * arguments.microbatches
    seconds = {way: times[way].seconds for way in WAYS}
    best = min((w for w in WAYS if w != "spread"), key=lambda way: median(seconds[way]))
    return {
        "samples_per_s": {way: samples / median(found) for way, found in seconds.items()},
        "best": best,
        "gain": ratio(seconds[best], seconds["spread"]),
    }


def worker(arguments: argparse.Namespace) -> None:
    """Measure in this process of torchrun; the first one prints."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: Any = memory(arguments.memory, arguments) if arguments.memory else speed(arguments)
    if dist.get_rank() == 0:
        print(json.dumps({"found": found}), flush=True)
    dist.destroy_process_group()


def job(given: Sequence[str], processes: int) -> Any:
    """Run a job of processes; return what the first one has printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", MODULE, *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"found"')]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(given)}: {done.stderr[-2000:]}")
    return json.loads(lines[-1])["found"]


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, start the jobs and print; or measure as one of their processes."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plans", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(given)
    if is_started():
        worker(arguments)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        make_plans(Path(folder), arguments)
        common = [*(word for word in given if word != "--json"), "--plans", folder]
        run = partial(job, processes=arguments.processes)
        found = run(common) if arguments.rounds else {}
        found["peak_bytes"] = {way: run([*common, "--memory", way]) for way in WAYS}
    print(json.dumps(found, indent=1) if arguments.json else table(found))
    return 0


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    peaks, speeds = found["peak_bytes"], found.get("samples_per_s", {})
    full, later = ({way: max(each[i] for each in peaks[way]) for way in WAYS} for i in (0, 1))
    least = [min(of[way] for way in WAYS if way != "spread") for of in (full, later)]
    lines = ["| split | samples/s | fullest process: peak of the whole run, MB | of later steps |"]
    lines.append("|---|---|---|---|")
    lines += [
        f"| {way} | {format(speeds[way], '.2f') if speeds else 'not measured'} "
        f"| {full[way] / 1e6:.0f} | {later[way] / 1e6:.0f} |"
        for way in WAYS
    ]
    lines.append(
        f"\nspread: {full['spread'] / least[0]:.2f} x the least peak of a whole run, "
        f"{later['spread'] / least[1]:.2f} x that of later steps"
    )
    if speeds:
        gain = found["gain"]
        lines.append(
            f"{gain['median']:.2f} x the samples/s of {found['best']} (quartiles "
            f"{gain['low']:.2f} to {gain['high']:.2f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
