"""Time and memory of an output head with its loss: ours against ``linear`` + ``cross_entropy``.

    python -m benchmarks.kernel_linear_cross_entropy [--vocab 32000 250112] [--json]

One step is forward and backward for input and weight, whose gradients are counted.

Memory: every variant runs one step in a process of its own, after a tiny step that loads the
libraries and with its operands in place. The kernel's mark of the most resident memory is reset
(``/proc/self/clear_refs``) and read after the step, less what was resident before it.

Time: all variants run in one process, one after the other in every round, so that the load of the
machine falls on all alike; printed are medians, and medians of the rounds' ratios. ``cpu`` is the
ratio of processor seconds of all threads, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.memory_probe import reset_peak, resident_bytes
from ipu_pipeline.ops import extension
from ipu_pipeline.ops.linear_cross_entropy import linear_cross_entropy

DTYPES = ("float32", "bfloat16")
GIB = 2**30


def plain(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the loss in torch's two steps."""
    return functional.cross_entropy(functional.linear(x, weight), target)


def recompute(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the loss; backward computes the logits again."""
    return linear_cross_entropy(x, weight, target, hold_gradients=False)


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": plain,
    "ours, gradients held": linear_cross_entropy,
    "ours, recomputed": recompute,
}


def operands(vocab: int, hidden: int, tokens: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return random input, weight and targets; row by row, to leave no large buffer behind."""
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.empty(vocab, hidden, dtype=x.dtype)
    for rows in weight.split(1024):
        rows.copy_(torch.randn(rows.shape).mul_(0.02))
    return x, weight.requires_grad_(), torch.randint(vocab, (tokens,))


def peak_bytes(variant: str, vocab: int, hidden: int, tokens: int, dtype: str) -> int:
    """Return how much the resident memory of this process grows at most during one step."""
    VARIANTS[variant](*operands(300, hidden, 64, dtype)).backward()
    given = operands(vocab, hidden, tokens, dtype)
    reset_peak()
    before = resident_bytes("VmRSS")
    VARIANTS[variant](*given).backward()
    return resident_bytes("VmHWM") - before


def seconds(vocab: int, hidden: int, tokens: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Return, for every round, wall and processor seconds of every variant."""
    x, weight, target = operands(vocab, hidden, tokens, dtype)
    found = []
    for _ in range(rounds + 1):
        found.append({})
        for name, loss in VARIANTS.items():
            x.grad = weight.grad = None
            start, start_cpu = time.perf_counter(), time.process_time()
            loss(x, weight, target).backward()
            found[-1][name] = (time.perf_counter() - start, time.process_time() - start_cpu)
    return found[1:]


def measure(vocab: int, dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one record for every variant; ratios are to the plain one."""
    sizes = (vocab, arguments.hidden, arguments.tokens, dtype)
    peaks = {name: _in_a_process(name, *sizes, arguments.threads) for name in VARIANTS}
    times = seconds(*sizes, arguments.rounds)
    return [
        {
            "vocab": vocab,
            "dtype": dtype,
            "variant": name,
            "peak_bytes": peaks[name],
            "peak_ratio": peaks[name] / peaks["plain"],
            "step_s": statistics.median(each[name][0] for each in times),
            "time_ratio": statistics.median(each[name][0] / each["plain"][0] for each in times),
            "cpu_ratio": statistics.median(each[name][1] / each["plain"][1] for each in times),
        }
        for name in VARIANTS
    ]


def _in_a_process(variant: str, *sizes: Any) -> int:
    command = [sys.executable, "-m", "benchmarks.kernel_linear_cross_entropy", "--peak-of"]
    done = subprocess.run(
        [*command, json.dumps([variant, *sizes])], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def _too_large(vocab: int, dtype: str, tokens: int, hidden: int) -> str | None:
    # Logits, their log-softmax and its gradient; weight and gradient.
    needed = (3 * vocab * tokens + 3 * vocab * hidden) * getattr(torch, dtype).itemsize
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    if needed * 1.2 < free:
        return None
    return f"plain needs about {needed / GIB:.1f} GiB, free are {free / GIB:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table, or with ``--json`` the records it is made of."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_linear_cross_entropy")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peak_of:
        variant, *sizes, threads = json.loads(arguments.peak_of)
        torch.set_num_threads(threads)
        print(peak_bytes(variant, *sizes))
        return 0
    torch.set_num_threads(arguments.threads)
    records = []
    for vocab in arguments.vocab:
        for dtype in arguments.dtype:
            reason = _too_large(vocab, dtype, arguments.tokens, arguments.hidden)
            if reason:
                print(f"V={vocab} {dtype} left out: {reason}", file=sys.stderr)
                continue
            records += measure(vocab, dtype, arguments)
    print(json.dumps(records, indent=1) if arguments.json else _table(records, arguments))
    return 0


def _table(records: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    lines = [
        f"hidden {arguments.hidden}, {arguments.tokens} tokens, {arguments.threads} threads, "
        f"kernels: {extension.state().detail}",
        f"{'vocabulary':>10} {'type':8} {'':20} {'peak MiB':>9} {'ratio':>6} "
        f"{'seconds':>8} {'ratio':>6} {'cpu':>6}",
    ]
    lines += [
        f"{each['vocab']:10} {each['dtype']:8} {each['variant']:20} "
        f"{each['peak_bytes'] / 2**20:9.0f} {each['peak_ratio']:6.3f} "
        f"{each['step_s']:8.3f} {each['time_ratio']:6.3f} {each['cpu_ratio']:6.3f}"
        for each in records
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
