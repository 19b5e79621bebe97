"""The lookups against functional.embedding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ipu_pipeline.ops import embedding
from ipu_pipeline.ops.embedding import embedding_serialized, fast_embedding
from ipu_pipeline.ops.linear import adding_to_grad
from ipu_pipeline.ops.random import block_scope
from tests.ops.paths import BOTH, choose

V, H = 23, 5


@pytest.fixture(params=BOTH, autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation a test runs on."""
    choose(request.param, embedding, request, monkeypatch)
    return request.param


def table(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(0)).to(dtype)


def some_ids(*shape: int) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(1))


def gradient_of(function, weight_VH: Tensor, upstream_seed: int = 2) -> tuple[Tensor, Tensor]:
    leaf = weight_VH.clone().requires_grad_()
    out = function(leaf)
    generator = torch.Generator().manual_seed(upstream_seed)
    upstream = torch.randn(out.shape, generator=generator).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, leaf, upstream)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(7,), (3, 40), (2, 3, 4), ()])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 4}, {"padding_idx": -1},
                                     {"scale_grad_by_freq": True}])  # fmt: skip
def test_equals_functional_embedding(dtype, ids_dtype, shape, options) -> None:
    ids = some_ids(*shape).to(ids_dtype)
    expected, dense = gradient_of(
        lambda w: functional.embedding(ids, w, **options), table(torch.float64).to(dtype).double()
    )
    found, sparse = gradient_of(
        lambda w: embedding_serialized(ids, w, factor=4, **options), table().to(dtype)
    )
    assert found.dtype == sparse.dtype == dtype
    assert torch.equal(found.double(), expected)
    assert sparse.is_sparse
    assert sparse.is_coalesced()
    assert sparse._nnz() <= ids.numel()
    # The reference got float64 upstream gradients; these were rounded to dtype before the sum.
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(
        sparse.to_dense().double(), dense, rtol=tolerance, atol=4 * tolerance
    )


def test_the_row_of_padding_gets_no_gradient() -> None:
    ids = torch.tensor([4, 2, 4])
    out, sparse = gradient_of(lambda w: embedding_serialized(ids, w, factor=2, padding_idx=4),
                              table())  # fmt: skip
    assert torch.equal(out[0], table()[4])
    assert sparse.indices().tolist() == [[2]]


def test_the_gradient_is_added_into_a_dense_one_in_place() -> None:
    leaf = table().requires_grad_()
    leaf.grad = torch.ones(V, H)
    storage = leaf.grad.data_ptr()
    ids = some_ids(50)
    embedding_serialized(ids, leaf, factor=3).sum().backward()
    assert not leaf.grad.is_sparse
    assert leaf.grad.data_ptr() == storage
    counts_V = torch.bincount(ids, minlength=V)
    assert torch.equal(leaf.grad, 1.0 + counts_V[:, None].expand(V, H))


def test_the_names_of_a_module_stay() -> None:
    module = nn.Embedding(V, H)
    before = dict(module.state_dict())
    embedding_serialized(some_ids(9), module.weight, factor=5).sum().backward()
    assert list(module.state_dict()) == ["weight"]
    assert torch.equal(module.state_dict()["weight"], before["weight"])
    assert module.weight.grad.shape == module.weight.shape


@pytest.mark.parametrize("factor", [1, 2, 3, 22, 23])
def test_every_factor_gives_the_same_bits(factor: int) -> None:
    ids = some_ids(4, 30)
    one = gradient_of(lambda w: embedding_serialized(ids, w, factor=1), table())
    found = gradient_of(lambda w: embedding_serialized(ids, w, factor=factor), table())
    assert torch.equal(found[0], one[0])
    assert torch.equal(found[1].to_dense(), one[1].to_dense())


def test_tables_and_ids_in_any_layout() -> None:
    ids = some_ids(30, 4).t()[:, ::2]
    weight_VH = table().t().contiguous().t()
    out, sparse = gradient_of(lambda w: embedding_serialized(ids, w, factor=4), weight_VH)
    expected, dense = gradient_of(lambda w: functional.embedding(ids, w), weight_VH)
    assert torch.equal(out, expected)
    torch.testing.assert_close(sparse.to_dense(), dense)
    leaf = table().requires_grad_()  # an upstream gradient that is expanded and transposed
    embedding_serialized(ids, leaf, factor=4).sum(0).t().sum().backward()
    assert torch.equal(leaf.grad.to_dense()[:, 0],
                       torch.bincount(ids.flatten(), minlength=V).float())  # fmt: skip


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_no_ids(shape) -> None:
    out, sparse = gradient_of(
        lambda w: embedding_serialized(torch.zeros(shape, dtype=torch.long), w, factor=2), table()
    )
    assert out.shape == (*shape, H)
    assert sparse._nnz() == 0
    assert torch.equal(sparse.to_dense(), torch.zeros(V, H))


class DenseGradient(torch.autograd.Function):
    """Returns its input; gradcheck wants a gradient in the layout of the input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.to_dense()


def test_gradcheck() -> None:
    ids = some_ids(3, 4)
    weight_VH = table(torch.float64).requires_grad_()

    def lookup(weight_VH: Tensor) -> Tensor:
        return embedding_serialized(ids, DenseGradient.apply(weight_VH), factor=3)

    assert torch.autograd.gradcheck(lookup, (weight_VH,))


@pytest.mark.parametrize("whole", [True, False])
def test_parts_of_a_table_add_up_to_all_of_it(whole: bool) -> None:
    ids = some_ids(6, 9)
    expected, dense = gradient_of(lambda w: functional.embedding(ids, w, padding_idx=12), table())
    sums = torch.zeros_like(expected)
    gradients = torch.zeros(V, H)
    for first, last in [(0, 10), (10, 11), (11, V)]:
        part = table() if whole else table()[first:last]
        out, sparse = gradient_of(
            lambda w, r=(first, last): embedding_serialized(
                ids, w, factor=1, padding_idx=12, rows=r
            ),
            part,
        )
        outside = (ids < first) | (ids >= last)
        assert not out[outside].any()
        sums += out
        gradients[slice(None) if whole else slice(first, last)] += sparse.to_dense()
    assert torch.equal(sums, expected)
    torch.testing.assert_close(gradients, dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0}, "factor is 0 for a table of 23 rows; use a factor from 1 to 23"),
        ({"factor": 24}, "factor is 24 for a table of 23 rows"),
        ({"factor": 1, "padding_idx": 23}, "padding_idx is 23 .* from -23 to 22"),
        ({"factor": 1, "padding_idx": -24}, "padding_idx is -24"),
        ({"factor": 1, "rows": (20, 24)}, r"rows is \(20, 24\) for a table of 23 rows"),
        ({"factor": 1, "rows": (5, 5)}, r"rows is \(5, 5\)"),
        ({"factor": 1, "rows": (-1, 5)}, r"rows is \(-1, 5\)"),
        ({"factor": 1, "rows": (0, 5), "padding_idx": -2}, "padding_idx is -2 together with rows"),
    ],
)
def test_refusals(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        embedding_serialized(some_ids(3), table(), **options)


@pytest.mark.parametrize("bad", [V, -1])
def test_an_id_outside_of_the_table(bad: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        embedding_serialized(torch.tensor([0, bad]), table(), factor=1)


def on_every_path(monkeypatch: pytest.MonkeyPatch, function) -> list[tuple[Tensor, ...]]:
    found = [function()]
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "_kernels", lambda *_: False)
        found.append(function())
    return found


@pytest.mark.parametrize("path", ["kernel"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"padding_idx": 4}, {"scale_grad_by_freq": True},
                                     {"rows": (3, 17)}])  # fmt: skip
def test_both_paths_give_the_same_bits(path, monkeypatch, dtype, options) -> None:
    ids = some_ids(5, 60)
    kernel, plain = on_every_path(
        monkeypatch,
        lambda: gradient_of(
            lambda w: embedding_serialized(ids, w, factor=2, **options), table().to(dtype)
        ),
    )
    assert torch.equal(kernel[0], plain[0])
    assert torch.equal(kernel[1].indices(), plain[1].indices())
    assert torch.equal(kernel[1].values(), plain[1].values())


def test_1_2_and_4_threads_give_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    weight_VH = torch.randn(5000, 300, generator=generator)
    ids = torch.randint(0, 5000, (8000,), generator=generator)
    ids[::3] = 7  # one row takes a third of the work
    found = []
    for num_threads in (1, 2, 4):
        torch.set_num_threads(num_threads)
        found.append(gradient_of(lambda w: embedding_serialized(ids, w, factor=4), weight_VH))
    torch.set_num_threads(1)
    for out, sparse in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(sparse.indices(), found[0][1].indices())
        assert torch.equal(sparse.values(), found[0][1].values())


@pytest.mark.parametrize("path", ["kernel"], indirect=True)
def test_operators_are_declared_right(path: str) -> None:
    embedding._kernels()
    operators = torch.ops.ipu_pipeline
    ids = some_ids(12)
    torch.library.opcheck(operators.embedding_serialized.default, (ids, table(), 3, 17, 0, True))
    torch.library.opcheck(
        operators.embedding_serialized_backward.default,
        (torch.randn(12, H), ids, 0, V, 0, 4, True),
    )


@pytest.mark.parametrize("path", ["kernel"], indirect=True)
def test_a_gradient_of_another_shape_is_refused(path: str) -> None:
    with pytest.raises(RuntimeError, match=r"the gradient has shape \[3, 5\] for 4 ids"):
        torch.ops.ipu_pipeline.embedding_serialized_backward(
            torch.zeros(3, H), torch.zeros(4, dtype=torch.long), 0, V, 0, -1, False
        )


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("path", ["kernel"], indirect=True)
def test_rows_are_added_to_grad_with_torchs_bits(
    path: str, padding_idx: int | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(5)
    tables = [nn.Parameter(torch.randn(8200, 130, generator=generator)) for _ in range(2)]
    tables[1].data.copy_(tables[0].data)
    for microbatch in range(3):
        ids = torch.randint(0, 8200, (2, 64), generator=generator, dtype=dtype)
        ids[0, :40], ids[1, :9] = 3, 8199
        seed = torch.randn(2, 64, 130, generator=generator)
        plain = functional.embedding(ids, tables[0], padding_idx)
        plain.backward(seed)
        with block_scope(0, 0, microbatch, "block"):
            ours = functional.embedding(ids, tables[1], padding_idx)
        with adding_to_grad():
            torch.autograd.backward([ours], [seed])
        assert torch.equal(plain, ours)
        assert torch.equal(tables[0].grad, tables[1].grad)


@pytest.mark.parametrize("path", ["kernel"], indirect=True)
def test_hooks_and_second_derivatives_get_torchs_gradient(path: str) -> None:
    weight = nn.Parameter(torch.randn(8200, 130))
    weight.grad = torch.zeros_like(weight)
    ids = torch.tensor([[1, 2, 1]])
    seen: list[Tensor] = []
    with block_scope(0):
        looked_up = functional.embedding(ids, weight).pow(2).sum()
        (first,) = torch.autograd.grad(looked_up, weight, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), weight)
        weight.register_hook(seen.append)
        with adding_to_grad():
            functional.embedding(ids, weight).sum().backward()
    assert torch.equal(second[2], 8 * weight.detach()[2])
    assert seen[0][1].eq(2).all()
    assert torch.equal(weight.grad, seen[0])


def test_what_torch_computes_as_fast_is_left_to_it(path: str) -> None:
    large, ids = nn.Parameter(torch.zeros(8200, 130)), torch.tensor([1])
    assert (fast_embedding(ids, large) is None) == (path == "plain torch")
    assert fast_embedding(ids, nn.Parameter(torch.zeros(100, 130))) is None
    assert fast_embedding(torch.arange(8200), large) is None
    assert fast_embedding(ids, large.detach()) is None
    assert fast_embedding(ids, large, max_norm=1.0) is None
    assert fast_embedding(ids, large, sparse=True) is None
    with torch.no_grad():
        assert fast_embedding(ids, large) is None
