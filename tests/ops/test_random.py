from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ipu_pipeline.ops import attention as ops_attention
from ipu_pipeline.ops import dropout as ops_dropout
from ipu_pipeline.ops import random as ops_random
from ipu_pipeline.ops.dropout import bernoulli_counter_, dropout_counter
from ipu_pipeline.ops.random import block_scope, derive_seed, is_random

X = torch.linspace(0.1, 0.9, 64).reshape(8, 8)
WAVES = (X * 99).sin().repeat(1, 1, 4, 4)
HEADS = X.reshape(1, 2, 4, 8)
LSTM, GRU, RNN = (make(8, 8, 2, dropout=0.5) for make in (nn.LSTM, nn.GRU, nn.RNN))
ATTENTION = nn.MultiheadAttention(8, 2, dropout=0.5)
LAYER = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5)
DRAWS = {
    "dropout": lambda: functional.dropout(X),
    "dropout in place": lambda: functional.dropout(X.clone(), inplace=True),
    "nn.Dropout": lambda: nn.Dropout(0.5)(X),
    "torch.dropout": lambda: torch.dropout(X, 0.5, train=True),
    "native_dropout": lambda: torch.native_dropout(X, 0.5, train=True)[0],
    "dropout1d": lambda: functional.dropout1d(X),
    "alpha_dropout": lambda: functional.alpha_dropout(X, training=True),
    "feature_alpha_dropout": lambda: functional.feature_alpha_dropout(X, training=True),
    "sdpa": lambda: functional.scaled_dot_product_attention(HEADS, HEADS, HEADS, dropout_p=0.5),
    "sdpa positional": lambda: functional.scaled_dot_product_attention(*[HEADS] * 3, None, 0.5),
    "gumbel_softmax": lambda: functional.gumbel_softmax(X),
    "rrelu": lambda: functional.rrelu(-X, training=True),
    "fractional pool": lambda: functional.fractional_max_pool2d(WAVES, 2, output_size=20),
    "rand": lambda: torch.rand(9),
    "rand out": lambda: torch.rand(9, out=torch.empty(9)),
    "randn": lambda: torch.randn(9),
    "randint": lambda: torch.randint(2, 1000, (9,)),
    "randint from 0": lambda: torch.randint(1000, (9,)),
    "randint out": lambda: torch.randint(2, 1000, (9,), out=torch.empty(9, dtype=torch.long)),
    "randperm": lambda: torch.randperm(50),
    "rand_like": lambda: torch.rand_like(X),
    "randn_like": lambda: torch.randn_like(X),
    "randint_like": lambda: torch.randint_like(X, 1000),
    "bernoulli": lambda: torch.bernoulli(X),
    "bernoulli p": lambda: X.bernoulli(0.5),
    "bernoulli_": lambda: X.clone().bernoulli_(0.5),
    "bernoulli_ tensor": lambda: X.clone().bernoulli_(X),
    "normal": lambda: torch.normal(X, X),
    "normal mean": lambda: torch.normal(X, 1.0),
    "normal std": lambda: torch.normal(0.0, X),
    "normal size": lambda: torch.normal(0.0, 1.0, (9,)),
    "multinomial": lambda: X.multinomial(4),
    "poisson": lambda: torch.poisson(X * 50),
    "binomial": lambda: torch.binomial(X * 100, X),
    "random_": lambda: X.clone().random_(2, 900),
    "exponential_": lambda: X.clone().exponential_(),
    "geometric_": lambda: X.clone().geometric_(0.1),
    "cauchy_": lambda: X.clone().cauchy_(),
    "log_normal_": lambda: X.clone().log_normal_(),
    "uniform_": lambda: X.clone().uniform_(),
    "normal_": lambda: X.clone().normal_(),
    "Gamma": lambda: torch.distributions.Gamma(X, 1.0).rsample(),
    "Dirichlet": lambda: torch.distributions.Dirichlet(X).rsample(),
    "StudentT": lambda: torch.distributions.StudentT(5.0).rsample((9,)),
    "Categorical": lambda: torch.distributions.Categorical(X).sample((9,)),
    "trunc_normal_": lambda: nn.init.trunc_normal_(X.clone()),
    "lstm": lambda: LSTM(X[None])[0],
    "gru": lambda: GRU(X[None])[0],
    "rnn": lambda: RNN(X[None])[0],
    "attention": lambda: ATTENTION(X[None], X[None], X[None])[0],
    "encoder layer": lambda: LAYER(X[None]),
}  # fmt: skip


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_key_alone_decides(draw) -> None:
    """Same key, same numbers; another key, others; the global state is neither used nor moved."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with block_scope("seed", 0, 3, "block"):
        first = draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    with block_scope("seed", 0, 3, "block"):
        again = draw()
    with block_scope("seed", 0, 4, "block"):
        other = draw()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_seeded_torch_function_is_known() -> None:
    """Walks over all ATen operations that draw, and looks their Python functions up."""
    drawing = set()
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        packet = getattr(torch.ops.aten, name, None) if namespace == "aten" else None
        overload = getattr(packet, schema.overload_name or "default", None)
        if overload is not None and torch.Tag.nondeterministic_seeded in overload.tags:
            drawing.add(name)
    assert {"bernoulli", "native_dropout", "randn_like"} <= drawing
    reachable = {
        function
        for owner in (torch, Tensor, functional)
        for name in drawing
        if not name.startswith("_") or name == "_standard_gamma"
        if callable(function := getattr(owner, name, None))
    }
    # Another device's kernels, which no code calls by name.
    reachable -= {torch.miopen_rnn}
    assert reachable <= ops_random._COMPOSITE | ops_random._GENERATOR


def test_numbers_go_on_inside_a_scope() -> None:
    with block_scope(1):
        first, second = torch.rand(4), torch.rand(4)
    assert not torch.equal(first, second)
    with block_scope(1):
        assert torch.equal(torch.rand(8)[:4], first)


@pytest.mark.parametrize("other", [(1, 2, 4), (1, 3), (12, 3), ("1", 2, 3, "")])
def test_every_part_of_the_key_counts(other: tuple[int | str, ...]) -> None:
    assert derive_seed(1, 2, 3) != derive_seed(*other)
    assert 0 <= derive_seed(*other) < 2**63


def test_innermost_scope_wins() -> None:
    with block_scope("inner"):
        alone = torch.rand(4)
    with block_scope("outer"):
        outer_first = torch.rand(4)
        with block_scope("inner"):
            nested = torch.rand(4)
        outer_second = torch.rand(4)
    with block_scope("outer"):
        undisturbed = torch.rand(8)
    assert torch.equal(nested, alone)
    assert torch.equal(torch.cat([outer_first, outer_second]), undisturbed)


def test_own_generator_of_the_caller_is_respected() -> None:
    expected = torch.rand(4, generator=torch.Generator().manual_seed(5))
    with block_scope(1):
        found = torch.rand(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(found, expected)


def test_eight_threads_at_once_give_what_one_gives() -> None:
    barrier = Barrier(8)

    def work(key: int) -> Tensor:
        barrier.wait()
        with block_scope(key):
            return torch.cat([functional.dropout(X).flatten() for _ in range(20)])

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(8)))
    for key, found in enumerate(together):
        with block_scope(key):
            alone = torch.cat([functional.dropout(X).flatten() for _ in range(20)])
        assert torch.equal(found, alone)


def test_the_nth_mask_of_a_scope_is_its_stream_n() -> None:
    seed = derive_seed("a", 1)
    with block_scope("a", 1):
        torch.rand(3)  # the generator counts for itself
        found = [
            functional.dropout(X, 0.3),
            torch.dropout(X, 0.3, train=True),
            X.clone().bernoulli_(0.7),
            torch.native_dropout(X, 0.3, train=True)[0],
        ]
    mask = bernoulli_counter_(torch.empty_like(X), 0.7, seed, 2)
    assert torch.equal(found[0], dropout_counter(X, 0.3, seed, 0))
    assert torch.equal(found[1], dropout_counter(X, 0.3, seed, 1))
    assert torch.equal(found[2], mask)
    torch.testing.assert_close(found[3], dropout_counter(X, 0.3, seed, 3))


@pytest.mark.parametrize("name", DRAWS)
def test_the_numbers_do_not_depend_on_the_library(name: str, monkeypatch) -> None:
    with block_scope("seed", 0):
        found = DRAWS[name]()
    monkeypatch.setattr(ops_dropout, "_kernels", lambda *_: False)
    monkeypatch.setattr(ops_attention, "_kernels", lambda *_: False)
    with block_scope("seed", 0):
        again = DRAWS[name]()
    torch.testing.assert_close(again, found)  # matmuls of attention differ by rounding
    assert torch.equal(again, found) or "sdpa" in name


@pytest.mark.parametrize(
    "drop_",
    [
        lambda x: functional.dropout(x, 0.4, inplace=True),
        lambda x: torch.dropout_(x, 0.4, train=True),
        lambda x: nn.Dropout(0.4, inplace=True)(x),
    ],
)
def test_dropout_in_place(drop_) -> None:
    leaf = X.clone().requires_grad_()
    x = leaf * 1
    with block_scope(3):
        y = drop_(x[:, ::2])
    kept = dropout_counter(torch.ones_like(X[:, ::2]), 0.4, derive_seed(3), 0)
    assert torch.equal(x[:, ::2], y)
    assert torch.equal(y, X[:, ::2] * kept)
    assert torch.equal(x[:, 1::2], X[:, 1::2])
    x.sum().backward()
    assert torch.equal(leaf.grad[:, ::2], kept)
    assert torch.equal(leaf.grad[:, 1::2], torch.ones_like(X[:, 1::2]))
    with block_scope(3), pytest.raises(RuntimeError, match="leaf Variable"):
        drop_(X.clone().requires_grad_())


def test_dropout_that_torch_refuses_is_still_refused() -> None:
    with block_scope(1):
        with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
            functional.dropout(X, 1.5)
        with pytest.raises(RuntimeError, match="Long"):
            functional.dropout(torch.ones(3, dtype=torch.long))
        assert not functional.dropout(X, 1.0).any()


def test_recomputation_replays_the_masks() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    gradients = []

    def call(x: Tensor) -> Tensor:
        with block_scope(7, "layer"):
            q = x.unflatten(-1, (2, 4)).transpose(1, 2)
            x = x + functional.scaled_dot_product_attention(q, q, q, dropout_p=0.2).mean()
            return layer(functional.dropout(x))

    for recompute in (False, True):
        x = X[None].clone().requires_grad_()
        y = checkpoint(call, x, use_reentrant=False) if recompute else call(x)
        gradients.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert all(map(torch.equal, *gradients))


def test_dropout_mask_has_the_right_share_scale_and_gradient() -> None:
    x = torch.ones(200, 500, requires_grad=True)
    with block_scope(0):
        y = functional.dropout(x, 0.1)
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(0.9, abs=0.005)
    assert torch.allclose(y[kept], torch.tensor(1 / 0.9))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_native_dropout_scales_like_torch(p: float) -> None:
    x = torch.ones(100, 100)
    with block_scope(0):
        y, mask = torch.native_dropout(x, p, train=True)
        same, _ = torch.native_dropout(x, p, train=False)
    assert torch.equal(same, x)
    assert float(mask.float().mean()) == pytest.approx(1 - p, abs=0.02)
    assert torch.allclose(y, mask * (1 / (1 - p) if p < 1 else 0.0))


def test_nothing_changes_outside_and_for_other_functions() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with block_scope(1):
        assert torch.equal(torch.add(X, 1), X + 1)
        assert torch.equal(functional.dropout(X, training=False), X)
        torch.rand(2)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "expected"),
    [
        (functional.dropout, (X,), {}, True),
        (functional.dropout, (X, 0.5, False), {}, False),
        (functional.dropout, (X,), {"training": False}, False),
        (functional.dropout, (X, 0.0), {}, False),
        (torch.dropout, (X, 0.5, True), {}, True),
        (torch.dropout, (X, 0.5), {"train": False}, False),
        (functional.scaled_dot_product_attention, (X, X, X), {}, False),
        (functional.scaled_dot_product_attention, (X, X, X, None, 0.1), {}, True),
        (functional.scaled_dot_product_attention, (X, X, X), {"dropout_p": 0.1}, True),
        (torch.rand, (3,), {}, True),
        (torch.add, (X, X), {}, False),
    ],
)
def test_is_random(func, args, kwargs, expected: bool) -> None:
    assert is_random(func, args, kwargs) is expected
