"""Peak memory of an mT5-small training step, eager and under a plan.

``python -m benchmarks.memory_mt5`` runs each way in a fresh process: the same random weights, the
same two microbatches, float32, AdamW. ``eager`` is transformers with gradient accumulation and
``torch.optim.AdamW``. ``plan`` takes the AdamW of our training loop and runs two stages with every
block recomputed, the head fused with the loss in slices and the lookups in slices. The plan is made
from the shapes alone, as on a laptop.

glibc raises the size from which it gives freed blocks back to the system, up to 32 MB, and keeps
smaller ones in an arena per thread. ``MALLOC_MMAP_THRESHOLD_`` holds that size down, so that
resident memory is what is allocated; both ways run with it.

Needs about 15 GB of free memory for ``eager``.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import ipu_pipeline as ipp
from benchmarks.memory_probe import Probe, run_child
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.planner.search import Constraints

MB = 1e6
MICROBATCHES = 2
SLICES = {"lm_head": 16, "encoder.embed_tokens": 8, "decoder.embed_tokens": 8}


def config() -> transformers.MT5Config:
    """Return the shape of google/mt5-small, without dropout.

    Without it the losses of the two ways can be compared.
    """
    return transformers.MT5Config(
        vocab_size=250112, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8,
        num_heads=6, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip


def untied(model: nn.Module) -> nn.Module:
    """Give ``model`` an output head of its own, as google/mt5-small has, in training mode.

    ``tie_word_embeddings=False`` would also give encoder and decoder different embeddings.
    """
    generator = torch.Generator().manual_seed(2)
    head = model.get_output_embeddings()
    weight = torch.empty_like(head.weight, requires_grad=False)
    if not weight.is_meta:
        weight.normal_(0.0, 0.05, generator=generator)
    head.weight = nn.Parameter(weight)
    return model.train()


def batch_of(samples: int, length: int) -> dict[str, Tensor]:
    """Return a whole batch of tokens, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    shape = (samples, length)
    return {
        "input_ids": torch.randint(1, 250000, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(1, 250000, shape, generator=generator),
    }


def make_plan(micro_batch: int, length: int) -> Plan:
    """Plan two stages from the shapes of one microbatch."""
    model, _ = from_config(config(), "seq2seq-lm", batch_size=micro_batch, seq_length=length)
    limits = Constraints(recompute="always", serialize=SLICES, same_device=(tuple(SLICES)[1:],))
    return ipp.plan(
        untied(model), batch_of(micro_batch, length), num_stages=2, microbatches=MICROBATCHES,
        schedule="1f1b", constraints=limits,
    )  # fmt: skip


def run(way: str, plan: Plan, micro_batch: int, length: int) -> dict[str, Any]:
    """Run one training step in this process and measure it."""
    torch.manual_seed(0)
    model = untied(transformers.MT5ForConditionalGeneration(config()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=way != "eager")
    batch = batch_of(MICROBATCHES * micro_batch, length)
    parts = [{name: value[i : i + micro_batch] for name, value in batch.items()}
             for i in range(0, MICROBATCHES * micro_batch, micro_batch)]  # fmt: skip
    if way == "eager":
        _make_state(optimizer)
        started, probe = perf_counter(), Probe()
        loss = sum(_backward(model(**part).loss) for part in parts)
        used, seconds = probe.stop(), perf_counter() - started
    else:
        with ipp.compile(model, plan, optimizer=optimizer, self_check=False) as executable:
            executable.forward_backward(parts[0])  # captures, before there is optimizer state
            _make_state(optimizer)
            started, probe = perf_counter(), Probe()
            loss = executable.forward_backward(batch)
            used, seconds = probe.stop(), perf_counter() - started
    optimizer.step()
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "loss": loss,
        "gradient_norm": float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])),
        "process_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "heap": used.heap_peak,
        "resident": used.resident_peak,
        "held": 4 * weights,
        "seconds": seconds,
    }


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate gradients and optimizer state, as after a first step: what grows is activations."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def _backward(loss: Tensor) -> float:
    (loss / MICROBATCHES).backward()
    return loss.item() / MICROBATCHES


def main() -> None:
    """Run both ways and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ways", default="plan,eager")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--mmap-threshold",
        type=int,
        default=1 << 20,
        help="MALLOC_MMAP_THRESHOLD_ of the processes in bytes; 0 leaves glibc's own",
    )
    parser.add_argument("--child", help="run this way here with the plan of --plan, print JSON")
    parser.add_argument("--plan", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.child:
        found = run(options.child, Plan.load(options.plan), options.micro_batch, options.length)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.plan or Path(folder) / "plan.json"
        plan = make_plan(options.micro_batch, options.length)
        plan.save(path)
        timeline = simulate(plan)
        print(f"predicted activations {timeline.peak_activation_bytes / MB:.0f} MB")
        size = ["--micro-batch", str(options.micro_batch), "--length", str(options.length),
                "--threads", str(options.threads), "--plan", str(path)]  # fmt: skip
        threshold = options.mmap_threshold
        environment = {"MALLOC_MMAP_THRESHOLD_": str(threshold)} if threshold else {}
        for way in options.ways.split(","):
            found = run_child("benchmarks.memory_mt5", [*size, "--child", way], environment)
            print(
                f"{way:6} process peak {found['process_rss'] / MB:7.0f} MB, weights, gradients and "
                f"optimizer state {found['held'] / MB:.0f}, activations allocated "
                f"{found['heap'] / MB:.0f}, resident {found['resident'] / MB:.0f}; loss "
                f"{found['loss']:.7g}, gradient norm {found['gradient_norm']:.7g}, "
                f"{found['seconds']:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
