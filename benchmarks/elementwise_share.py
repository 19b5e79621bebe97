"""What share of a BERT feed-forward half-layer its elementwise parts take: a bound on fusing them.

A kernel that does a part in no time at all would make the step ``1 / (1 - share)`` times faster;
decision 0013 says which kernels were left out for that. Parts and whole are timed in turns.

    python -m benchmarks.elementwise_share [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

TOKENS = 2 * 384
HIDDEN = 768
INNER = 3072
EPS = 1e-12

Forward = Callable[..., Tensor]


def half_layer(x: Tensor, up: Tensor, b_up: Tensor, down: Tensor, b_down: Tensor) -> Tensor:
    """Return BERT's output half of a layer, without dropout (``ops.dropout_counter`` does it)."""
    inner = functional.gelu(functional.linear(x, up, b_up))
    return add_norm(functional.linear(inner, down, b_down), x)


def add_norm(x: Tensor, residual: Tensor) -> Tensor:
    """Return the normalised sum, as after every sublayer of BERT."""
    return functional.layer_norm(residual + x, (HIDDEN,), eps=EPS)


def timed(forward: Forward, leaves: tuple[Tensor, ...], gradient: Tensor) -> float:
    """Return the seconds of one forward and backward pass."""
    start = time.perf_counter()
    torch.autograd.grad(forward(*leaves), leaves, gradient)
    return time.perf_counter() - start


def shares(dtype: torch.dtype, rounds: int) -> tuple[float, float, float]:
    """Return the half-layer's milliseconds, and the shares of GELU and of the normalised sum."""

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    def gradient(width: int) -> Tensor:
        return torch.randn(TOKENS, width).to(dtype)

    whole = (
        leaf(TOKENS, HIDDEN),
        leaf(INNER, HIDDEN),
        leaf(INNER),
        leaf(HIDDEN, INNER),
        leaf(HIDDEN),
    )
    cases = (
        partial(timed, half_layer, whole, gradient(HIDDEN)),
        partial(timed, functional.gelu, (leaf(TOKENS, INNER),), gradient(INNER)),
        partial(timed, add_norm, (leaf(TOKENS, HIDDEN), leaf(TOKENS, HIDDEN)), gradient(HIDDEN)),
    )
    for case in cases:
        case()
    measured = [[case() for case in cases] for _ in range(rounds)]
    seconds, gelu, norm = zip(*measured, strict=True)
    return (
        1e3 * statistics.median(seconds),
        statistics.median(part / all_ for part, all_ in zip(gelu, seconds, strict=True)),
        statistics.median(part / all_ for part, all_ in zip(norm, seconds, strict=True)),
    )


def main() -> None:
    """Print one line per precision and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print("dtype     threads  half-layer ms   GELU  bound   add+norm  bound")
    for dtype in (torch.float32, torch.bfloat16):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            milliseconds, gelu, norm = shares(dtype, rounds)
            print(
                f"{str(dtype).removeprefix('torch.'):<9} {threads:>7} {milliseconds:>14.1f} "
                f"{gelu:>6.1%} {1 / (1 - gelu):>5.2f}x {norm:>9.1%} {1 / (1 - norm):>5.2f}x"
            )


if __name__ == "__main__":
    main()
