"""What counted dropout costs: ``python -m benchmarks.kernel_dropout [--threads N]``.

Three comparisons with torch, each interleaved, medians of forward and of backward: dropout of a
BERT-base feed-forward activation, attention with dropout, and one BERT-base layer trained inside
``block_scope`` as it draws now and as it drew from a ``torch.Generator``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.processes import ratio
from ipu_pipeline.ops import dropout, extension
from ipu_pipeline.ops import random as ops_random
from ipu_pipeline.ops.dropout import dropout_counter
from ipu_pipeline.ops.random import block_scope

P = 0.1
HIDDEN, HEADS, FEED_FORWARD, LENGTH, MICRO_BATCH = 768, 12, 3072, 384, 2


class Layer(nn.Module):
    """A BERT-base encoder layer with its four dropouts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.projection = nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, FEED_FORWARD), nn.Linear(FEED_FORWARD, HIDDEN)
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)])

    def forward(self, x_BLD: Tensor, mask: Tensor) -> Tensor:
        """Return the hidden states after the layer."""
        q, k, v = self.qkv(x_BLD).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(q, k, v, mask, P)
        attended = self.projection(heads.transpose(1, 2).flatten(2))
        x_BLD = self.norms[0](x_BLD + functional.dropout(attended, P))
        fed = self.down(functional.gelu(self.up(x_BLD)))
        return self.norms[1](x_BLD + functional.dropout(fed, P))


class Generated(ops_random._FromSource):
    """The way masks were drawn before: from the scope's generator."""

    def _bernoulli_(self, out: Tensor, p: float = 0.5) -> Tensor:
        return out.bernoulli_(p, generator=self.source.generator)


def before(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Run ``function`` in a scope that draws masks from a generator."""

    def run() -> Tensor:
        with (
            mock.patch.object(ops_random, "_OWN", {}),
            mock.patch.object(ops_random, "_FromSource", Generated),
            block_scope("benchmark"),
        ):
            return function()

    return run


def now(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Run ``function`` in a scope."""

    def run() -> Tensor:
        with block_scope("benchmark"):
            return function()

    return run


def saved_bytes(function: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps, without parameters and inputs."""
    known = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    return sum(saved.values())


@dataclass(frozen=True)
class Comparison:
    """Ways to compute the same.

    Attributes:
        title: What is computed.
        ways: By name; torch's first, the counted one last.
        leaves: What gradients are computed of.
    """

    title: str
    ways: Mapping[str, Callable[[], Tensor]]
    leaves: list[Tensor]

    def times(self, rounds: int) -> dict[str, list[tuple[float, float]]]:
        """Return forward and backward seconds of every way, by round."""
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in self.ways}
        for _ in range(rounds):
            for name, way in self.ways.items():
                with mock.patch.object(dropout, "_kernels", return_value="plain" not in name):
                    start = perf_counter()
                    out = way()
                    middle = perf_counter()
                    torch.autograd.grad(out, self.leaves, torch.ones_like(out))
                    found[name].append((middle - start, perf_counter() - middle))
        return found


def report(comparison: Comparison, rounds: int) -> None:
    """Print medians of each way, and the median ratio of the first to the last."""
    times = comparison.times(rounds)
    print(comparison.title)
    for name, way in comparison.ways.items():
        forward, backward = (1e3 * median(column) for column in zip(*times[name], strict=True))
        kept = saved_bytes(way, comparison.leaves) / 2**20
        print(f"  {name:24} {forward:8.2f} ms + {backward:8.2f} ms, keeps {kept:7.2f} MiB")
    first, *_, last = (list(map(sum, column)) for column in times.values())
    print(f"  {ratio(first, last)['median']:.2f} times as fast (median of {rounds} ratios)")


def comparisons() -> Iterator[Comparison]:
    """Yield what is compared: dropout alone, in attention, and in a layer."""
    torch.manual_seed(0)
    x = torch.randn(MICRO_BATCH, LENGTH, FEED_FORWARD, requires_grad=True)

    def counted() -> Tensor:
        return dropout_counter(x, P, 1, 2)

    ways = {
        "functional.dropout": lambda: functional.dropout(x, P),
        "counted, plain torch": counted,
        "counted, kernel": counted,
    }
    yield Comparison(f"dropout of {tuple(x.shape)}", ways, [x])

    shape = (MICRO_BATCH, LENGTH, HEADS, HIDDEN // HEADS)
    qkv = [torch.randn(shape).transpose(1, 2).requires_grad_() for _ in range(3)]
    mask = torch.zeros(MICRO_BATCH, 1, 1, LENGTH)

    def attention() -> Tensor:
        return functional.scaled_dot_product_attention(*qkv, mask, P)

    ways = {"generator": before(attention), "counted": now(attention)}
    yield Comparison(f"attention of {tuple(qkv[0].shape)}", ways, [*qkv])

    layer = Layer()
    hidden = torch.randn(MICRO_BATCH, LENGTH, HIDDEN, requires_grad=True)
    ways = {
        "generator": before(lambda: layer(hidden, mask)),
        "counted": now(lambda: layer(hidden, mask)),
    }
    leaves = [hidden, *layer.parameters()]
    yield Comparison("a BERT-base layer, micro batch 2, length 384", ways, leaves)


def main() -> None:
    """Run the three comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not dropout._kernels():
        raise SystemExit(extension.state().detail)
    print(f"{arguments.threads} threads, {extension.state().detail}")
    for comparison in comparisons():
        report(comparison, arguments.rounds)


if __name__ == "__main__":
    main()
