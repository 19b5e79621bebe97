"""Counted dropout: its words, its mask, its gradient, and that both paths agree in every bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ipu_pipeline.ops import dropout
from ipu_pipeline.ops.dropout import bernoulli_counter_, dropout_counter, philox_4x32
from tests.ops.paths import BOTH, choose

KEY = (2**62 + 12345, 2**40 + 7)
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=BOTH)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation a test runs on."""
    choose(request.param, dropout, request, monkeypatch)
    return request.param


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_published_words(counter: str, key: str, words: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    found = philox_4x32((c0, c1, c2, c3), (k0, k1))
    assert [f"{int(word):08x}" for word in found] == words.split()


def test_published_words_decide_the_mask(path: str) -> None:
    """Block 0 of key 0 decides elements 0, 16, 32 and 48: kept above its word, not at it."""
    for element, word in zip((0, 16, 32, 48), KNOWN[0][2].split(), strict=True):
        at_word = int(word, 16) / 2**32
        for keep_probability, expected in ((at_word, 0), (at_word + 2**-32, 1)):
            mask = bernoulli_counter_(torch.empty(64), keep_probability, 0, 0)
            assert float(mask[element]) == expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("count", "offset"), [(1, 0), (63, 64), (200, 37), (70_001, 2**40 + 5)])
def test_both_paths_give_the_same_bits(kernel, monkeypatch, dtype, count, offset) -> None:
    x = numbers(count, dtype=dtype)
    x[0] = float("inf")
    for p in (0.0, 1e-12, 0.1, 0.5, 0.9, 1.0):
        with monkeypatch.context() as patch:
            patch.setattr(dropout, "_kernels", lambda *_: False)
            plain = dropout_counter(x, p, *KEY, offset)
            plain_mask = bernoulli_counter_(torch.empty_like(x), 1 - p, *KEY, offset)
        assert torch.equal(dropout_counter(x, p, *KEY, offset), plain)
        assert torch.equal(bernoulli_counter_(torch.empty_like(x), 1 - p, *KEY, offset), plain_mask)
        assert plain.dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_those_of_the_mask(path: str, dtype) -> None:
    x = numbers(50, 40, dtype=dtype)
    mask = bernoulli_counter_(torch.empty(50, 40), 0.75, *KEY)
    expected = (x.double() * mask / 0.75).to(dtype)
    torch.testing.assert_close(dropout_counter(x, 0.25, *KEY), expected)
    assert torch.equal(dropout_counter(x, 0.0, *KEY), x)
    assert torch.equal(dropout_counter(x, 1.0, *KEY), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bool, torch.uint8, torch.int64])
def test_masks_of_any_type_and_layout(path: str, dtype) -> None:
    expected = bernoulli_counter_(torch.empty(30, 20), 0.6, *KEY)
    out = torch.empty(30, 20, dtype=dtype)
    assert bernoulli_counter_(out, 0.6, *KEY) is out
    assert torch.equal(out.float(), expected)
    transposed = bernoulli_counter_(torch.empty(20, 30, dtype=dtype).t(), 0.6, *KEY)
    assert torch.equal(transposed.float(), expected)
    assert bernoulli_counter_(out, 1.0, *KEY).all()
    assert not bernoulli_counter_(out, 0.0, *KEY).any()


def test_the_share_of_kept_elements(path: str) -> None:
    for p in (0.1, 0.5):
        mask = bernoulli_counter_(torch.empty(400_000), 1 - p, *KEY)
        # Four standard deviations.
        assert float(mask.mean()) == pytest.approx(1 - p, abs=4 * (p * (1 - p) / 400_000) ** 0.5)


def test_keys_give_different_masks(path: str) -> None:
    masks = [
        bernoulli_counter_(torch.empty(640), 0.5, seed, stream, offset)
        for seed, stream, offset in [(1, 0, 0), (2**32 + 1, 0, 0), (1, 1, 0), (1, 2**32, 0),
                                     (1, 0, 64), (0, 1, 0)]
    ]  # fmt: skip
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert float((mask == other).float().mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("cut", [1, 15, 64, 333, 4096])
def test_a_part_has_its_part_of_the_mask(path: str, cut: int) -> None:
    x = numbers(5000)
    whole = dropout_counter(x, 0.3, *KEY, 100)
    parts = [dropout_counter(x[:cut], 0.3, *KEY, 100), dropout_counter(x[cut:], 0.3, *KEY,
                                                                       100 + cut)]  # fmt: skip
    assert torch.equal(torch.cat(parts), whole)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_the_mask(path: str, layout: str) -> None:
    x = numbers(70, 50)
    other = LAYOUTS[layout](x)
    assert torch.equal(other, x)
    found = dropout_counter(other, 0.3, *KEY)
    assert torch.equal(found, dropout_counter(x, 0.3, *KEY))
    assert found.stride() == torch.empty_like(other).stride()


def test_an_expanded_tensor_has_a_mask_of_its_full_size(path: str) -> None:
    row = torch.ones(1, 500).expand(40, 500)
    found = dropout_counter(row, 0.5, *KEY)
    assert torch.equal(found, dropout_counter(torch.ones(40, 500), 0.5, *KEY))


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
def test_empty_and_scalar(path: str, shape) -> None:
    x = torch.ones(shape, requires_grad=True)
    y = dropout_counter(x, 0.5, *KEY)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert bernoulli_counter_(torch.empty(shape), 0.5, *KEY).shape == shape


def test_the_backward_pass_draws_the_same_mask_and_stores_nothing(path: str) -> None:
    saved = []
    x = numbers(60, 70).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = dropout_counter(x, 0.4, *KEY)
    upstream = numbers(70, 60).t()
    y.backward(upstream)
    assert saved == []
    assert torch.equal(x.grad, dropout_counter(upstream, 0.4, *KEY))


def test_gradcheck(path: str) -> None:
    x = numbers(9, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dropout_counter(x, 0.3, *KEY), (x,))
    assert torch.autograd.gradgradcheck(lambda x: dropout_counter(x, 0.3, *KEY), (x,))


@pytest.mark.parametrize("dtype", FLOATS)
def test_1_2_and_4_threads_give_the_same_bits(path: str, dtype) -> None:
    x = numbers(3, 33_333, dtype=dtype)
    found = []
    for num_threads in (1, 2, 4):
        torch.set_num_threads(num_threads)
        found.append(dropout_counter(x, 0.3, *KEY, 11))
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("how", ["fake", "meta"])
def test_tensors_without_data(path: str, how: str) -> None:
    device = "meta" if how == "meta" else "cpu"
    with FakeTensorMode():
        x = torch.empty(30, 40, device=device, requires_grad=True)
        y = dropout_counter(x, 0.5, *KEY)
        y.sum().backward()
        assert y.shape == x.grad.shape == (30, 40)
        assert bernoulli_counter_(torch.empty(5, device=device), 0.5, *KEY).shape == (5,)


def test_operators_are_declared_right(kernel) -> None:
    dropout._kernels()
    operators = torch.ops.ipu_pipeline
    for x in (numbers(5, 7), numbers(7, 5).t(), numbers(0)):
        torch.library.opcheck(operators.dropout_counter.default, (x, 2.0, 2**31, 1, 2, 3))
        torch.library.opcheck(operators.bernoulli_counter_.default, (x.clone(), 2**31, 1, 2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 0, 0, 0), r"p is 1.5; use a probability from 0 to 1"),
        ((-0.1, 0, 0, 0), r"p is -0.1"),
        ((float("nan"), 0, 0, 0), r"p is nan"),
        ((0.5, -1, 0, 0), r"seed is -1; use a number from 0 to 2\^63 - 1"),
        ((0.5, 0, 2**63, 0), r"stream is 9223372036854775808"),
        ((0.5, 0, 0, -4), r"offset is -4"),
    ],
)
def test_refusals(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dropout_counter(torch.ones(3), *arguments)


def test_more_refusals(kernel) -> None:
    with pytest.raises(ValueError, match=r"keep_probability is 2; use one from 0 to 1"):
        bernoulli_counter_(torch.ones(3), 2, 0, 0)
    with pytest.raises(TypeError, match=r"dropout of torch.int64 has no meaning"):
        dropout_counter(torch.ones(3, dtype=torch.int64), 0.5, 0, 0)
    operator = torch.ops.ipu_pipeline.dropout_counter
    with pytest.raises(RuntimeError, match=r"dropout of Long is not supported"):
        operator(torch.ones(3, dtype=torch.int64), 1.0, 1, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"the threshold is -1; it needs to be from 0 to 2\^32"):
        operator(torch.ones(3), 1.0, -1, 0, 0, 0)
