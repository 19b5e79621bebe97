"""Our operations against torch's, all ways interleaved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks import kernel_dropout, kernel_embedding, kernel_linear_cross_entropy
from benchmarks.suite.replay import CLOCK, ratio_to, record, seconds_of
from benchmarks.suite.workloads import Suite
from ipu_pipeline.ops import extension

pytestmark = pytest.mark.benchmark(group="kernels", timer=CLOCK.now)
Seconds = Mapping[str, Sequence[float]]


def dropout(which: int, rounds: int) -> Seconds:
    """Forward and backward of one of the comparisons."""
    comparison = [*kernel_dropout.comparisons()][which]
    comparison.times(1)
    return {name: [sum(both) for both in rows] for name, rows in comparison.times(rounds).items()}


def linear_cross_entropy(rounds: int) -> Seconds:
    """Output head and loss: 32,000 words, hidden 768, 768 tokens."""
    found = kernel_linear_cross_entropy.seconds(32_000, 768, 768, "float32", rounds)
    return {name: [each[name][0] for each in found] for name in found[0]}


def embedding(rounds: int) -> Seconds:
    """Lookup of 2,048 rows among 250,112, and its gradient."""
    found = kernel_embedding.times(rounds + 1)
    return {name: [sum(row[:2]) for row in rows[1:]] for name, rows in found.items()}


# By workload: what times it, torch's way that the others are held against, all others.
KERNELS = {
    "dropout, BERT-base feed forward": (
        lambda rounds: dropout(0, rounds),
        "functional.dropout",
        ("counted, plain torch", "counted, kernel"),
    ),
    "linear + cross entropy": (
        linear_cross_entropy,
        "plain",
        ("ours, gradients held", "ours, recomputed"),
    ),
    "serialized embedding": (
        embedding,
        "functional.embedding",
        ("serialized, plain torch", "serialized, kernel"),
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one benchmark per operation and way."""
    cases = [
        pytest.param(name, way, id=f"{name}-{way}".replace(" ", "_"))
        for name, (_, torchs, others) in KERNELS.items()
        for way in (torchs, *others)
    ]
    metafunc.parametrize(("name", "way"), cases)


@pytest.fixture(scope="module")
def timed(suite: Suite, quick: bool) -> Iterator[Any]:  # noqa: FBT001 - a fixture
    """Time every operation once, when its first way asks."""
    if not extension.state().usable:
        pytest.skip(f"the kernels are not there: {extension.state().detail}")
    before = torch.get_num_threads()
    torch.set_num_threads(suite.cores)
    rounds = suite.kernels.quick_rounds if quick else suite.kernels.rounds
    yield cache(lambda name: KERNELS[name][0](rounds))
    torch.set_num_threads(before)


def bench_kernel(benchmark: Any, timed: Any, name: str, way: str) -> None:
    """One way to compute an operation."""
    found, torchs = timed(name), KERNELS[name][1]
    metrics = [seconds_of(found[way])]
    if way != torchs:
        metrics.append(ratio_to("torch", found[torchs], found[way]))
    record(benchmark, name, way, found[way], metrics)
