"""The optimizer that rounds bfloat16 weights at random; the rounding itself is in test_rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ipu_pipeline.checkpoint import read_checkpoint, write_checkpoint
from ipu_pipeline.ops import adamw as module
from ipu_pipeline.ops import extension
from ipu_pipeline.ops.adamw import StochasticRoundingAdamW, adamw_step

NEEDS_LIBRARY = pytest.mark.skipif(
    not extension.state().usable, reason="the kernels are not built or switched off"
)
PATHS = [pytest.param("library", marks=NEEDS_LIBRARY), "plain"]
SHAPES = [(3,), (17, 33), (70_001,), (0,), (1,), (64, 64), ()]
SETTINGS = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "maximize": False
}  # fmt: skip


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> str:
    monkeypatch.setattr(module, "_kernels", lambda *_: request.param == "library")
    return request.param


def parameters(dtype=torch.bfloat16, shapes=SHAPES, seed=0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def copies(of: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in of]


def give_gradients(lists: list[list[nn.Parameter]], seed: int) -> None:
    """The same gradients to every list; sizes over several magnitudes."""
    torch.manual_seed(seed)
    for together in zip(*lists, strict=True):
        gradient = torch.randn(together[0].shape) * 10 ** float(torch.randn(()))
        for parameter in together:
            parameter.grad = gradient.to(parameter.dtype, copy=True)


def trained(seed: int = 0, order: tuple[int, ...] = (0, 1), steps: int = 1) -> list[Tensor]:
    held = [nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = StochasticRoundingAdamW([held[i] for i in order], lr=1e-3, seed=seed)
    for _ in range(steps):
        for p in held:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return [p.detach() for p in held]


# ------------------------------------------------------------------ the update


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_a_step_is_that_of_torch_in_float32_up_to_rounding(
    path, gradients, maximize, beta1
) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(shape).bfloat16() for shape in SHAPES]
    given = [torch.randn(w.shape).to(gradients) for w in weights]
    wide = [nn.Parameter(w.float()) for w in weights]
    torchs = torch.optim.AdamW(
        wide, lr=1e-2, betas=(beta1, 0.99), weight_decay=0.1, maximize=maximize
    )
    averages = [[torch.zeros(w.shape) for w in weights] for _ in range(2)]
    steps = [torch.zeros(()) for _ in weights]
    for _ in range(3):
        for parameter, weight, gradient in zip(wide, weights, given, strict=True):
            parameter.data.copy_(weight)
            parameter.grad = gradient.float()
        torchs.step()
        settings = {**SETTINGS, "beta1": beta1, "maximize": maximize}
        adamw_step(weights, given, *averages, steps, keys=[7] * len(weights), **settings)
    for i, (weight, exact) in enumerate(zip(weights, wide, strict=True)):
        torch.testing.assert_close(weight.float(), exact.detach(), rtol=2**-7, atol=1e-6)
        assert (
            weight.numel() == 0 or weight.numel() < 500 or not torch.equal(weight, exact.bfloat16())
        )
        for ours, name in zip(averages, ("exp_avg", "exp_avg_sq"), strict=True):
            torch.testing.assert_close(ours[i], torchs.state[exact][name], rtol=1e-5, atol=1e-6)
        assert float(steps[i]) == 3


@NEEDS_LIBRARY
def test_threads_do_not_change_bits() -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            held = parameters()
            optimizer = StochasticRoundingAdamW(held, lr=1e-3)
            for step in range(3):
                give_gradients([held], step)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        results.append([*held, *(optimizer.state[p]["exp_avg_sq"] for p in held)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_strides_do_not_matter(path) -> None:
    torch.manual_seed(0)
    base, gradient = torch.randn(40, 30).bfloat16(), torch.randn(40, 30).bfloat16()
    results = []
    for weight in (base, base.t().contiguous().t(), base.repeat(1, 2)[:, :30]):
        for given in (gradient, gradient.t().contiguous().t(), gradient.repeat(1, 2)[:, :30]):
            held = nn.Parameter(torch.empty_strided(weight.shape, weight.stride()).bfloat16())
            held.data = weight.clone(memory_format=torch.preserve_format)
            optimizer = StochasticRoundingAdamW([held], lr=1e-2)
            for _ in range(3):
                held.grad = given
                optimizer.step()
            results.append(held.detach())
    assert all(torch.equal(result, results[0]) for result in results)
    assert not torch.equal(results[0], base)


def test_seed_and_position_decide(path) -> None:
    first = trained()
    assert all(torch.equal(a, b) for a, b in zip(first, trained(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, trained(seed=1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, trained(order=(1, 0)), strict=True))


@NEEDS_LIBRARY
def test_kernel_and_plain_torch_train_alike(monkeypatch) -> None:
    results = []
    for usable in (True, False):
        monkeypatch.setattr(module, "_kernels", lambda *_, usable=usable: usable)
        results.append(torch.cat(trained(steps=5)))
    # A float32 ulp of the update decides differently once in some thousand roundings.
    assert (results[0] == results[1]).float().mean() > 0.995
    torch.testing.assert_close(*results, rtol=2**-6, atol=0)


def test_small_updates_add_up_where_rounding_to_nearest_loses_them(path) -> None:
    held, others = ([nn.Parameter(torch.ones(20_000).bfloat16())] for _ in range(2))
    runs = StochasticRoundingAdamW(held, lr=1e-4), torch.optim.AdamW(others, lr=1e-4)
    for _ in range(50):
        for p in (*held, *others):
            p.grad = torch.ones_like(p)
        for optimizer in runs:
            optimizer.step()
    # 50 steps of 1e-4 each (and 1e-6 of decay), below half of the spacing beneath 1.0.
    assert float(others[0].detach().double().mean()) == 1.0
    assert float(held[0].detach().double().mean()) == pytest.approx(1 - 50 * 1.01e-4, abs=1e-4)


def test_weights_of_other_types_take_torchs_step(path) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    narrow = parameters(seed=1)
    optimizer = StochasticRoundingAdamW([*ours, *narrow], lr=1e-2)
    expected = torch.optim.AdamW(theirs, lr=1e-2)
    for step in range(3):
        give_gradients([ours, theirs], step)
        give_gradients([narrow], step)
        kept = [p.grad for p in narrow]
        optimizer.step()
        expected.step()
        assert all(p.grad is g for p, g in zip(narrow, kept, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert not torch.equal(narrow[1], parameters(seed=1)[1])


def test_parameters_without_gradient_are_skipped(path) -> None:
    held = parameters()
    give_gradients([held], 0)
    held[1].grad = None
    before = [p.detach().clone() for p in held]
    optimizer = StochasticRoundingAdamW(held, lr=1e-2)
    optimizer.step()
    assert torch.equal(held[1], before[1])
    assert held[1] not in optimizer.state
    assert not torch.equal(held[2], before[2])


def test_autograd_notices_the_change(path) -> None:
    weight = nn.Parameter(torch.ones(3).bfloat16())
    optimizer = StochasticRoundingAdamW([weight])
    loss = (weight * weight).sum()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure_recomputes_with_gradients(path) -> None:
    weight = nn.Parameter(torch.ones(3).bfloat16())
    optimizer = StochasticRoundingAdamW([weight], lr=0.1, weight_decay=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight * weight).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] == 3.0
    assert losses[2] < losses[1] < losses[0]


# ------------------------------------------------------------------ refusals


def test_sparse_gradients_are_refused(path) -> None:
    table = nn.Embedding(5, 3, sparse=True).bfloat16()
    optimizer = StochasticRoundingAdamW(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    message = r"a parameter of shape \(5, 3\) has a gradient of layout .*sparse_coo"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert len(optimizer.state) == 0


def test_amsgrad_is_refused_for_bfloat16() -> None:
    match = r"amsgrad=True is not known to the step that rounds.*use torch.optim.AdamW"
    with pytest.raises(ValueError, match=match):
        StochasticRoundingAdamW(parameters(), amsgrad=True)
    optimizer = StochasticRoundingAdamW(parameters())
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": parameters(), "amsgrad": True})
    assert len(optimizer.param_groups) == 1


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(3), "weight 0 is Float; weights that are rounded at random are bfloat16"),
        (1, torch.zeros(4), r"gradient 0 has shape \[4\], its weight \[3\]"),
        (1, torch.zeros(3).half(), "gradient 0 is Half; it must be float32"),
        (2, torch.zeros(3).bfloat16(), "exp_avg 0 is BFloat16; it must be float32"),
        (3, torch.zeros(3).double(), "exp_avg_sq 0 is Double; it must be float32"),
        (4, torch.zeros(2), "step 0 has 2 elements of type Float; it must be one float32"),
        (4, torch.zeros((), dtype=torch.int64), "step 0 has 1 elements of type Long; it must be"),
    ],
)
def test_the_kernel_refuses_what_does_not_match(position, wrong, message) -> None:
    lists = [[torch.zeros(3).bfloat16()], *([torch.zeros(3)] for _ in range(3)), [torch.zeros(())]]
    lists[position] = [wrong]
    with pytest.raises(RuntimeError, match=message):
        adamw_step(*lists, keys=[0], **SETTINGS)
    assert not lists[4][0].any()


@NEEDS_LIBRARY
def test_opcheck() -> None:
    assert module._kernels()
    for shape in ((4, 3), (0,)):
        lists = (
            [torch.randn(shape).bfloat16()], *([torch.ones(shape)] for _ in range(3)),
            [torch.zeros(())],
        )  # fmt: skip
        operator = torch.ops.ipu_pipeline.adamw_step.default
        torch.library.opcheck(operator, lists, {**SETTINGS, "keys": [3]})


# ------------------------------------------------------------------ states and checkpoints


def test_state_dicts_go_to_torch_and_back(path) -> None:
    ours = parameters()
    theirs, back = copies(ours), copies(ours)
    first = StochasticRoundingAdamW(ours, lr=1e-2, betas=(0.8, 0.9))
    give_gradients([ours], 0)
    first.step()
    second = torch.optim.AdamW(theirs, lr=3.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state[theirs[0]]["exp_avg"].dtype == torch.bfloat16
    give_gradients([theirs], 1)
    second.step()
    third = StochasticRoundingAdamW(back, lr=7.0, seed=5)
    third.load_state_dict(copy.deepcopy(torch.optim.AdamW(copies(ours)).state_dict()))
    assert (third.param_groups[0]["seed"], third.param_groups[0]["lr"]) == (5, 1e-3)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    give_gradients([back], 2)
    third.step()
    assert third.param_groups[0]["betas"] == (0.8, 0.9)
    assert third.state[back[0]]["exp_avg"].dtype == torch.float32
    assert float(third.state[back[0]]["step"]) == 3


def test_float32_averages_survive_a_state_dict() -> None:
    held = parameters()
    first = StochasticRoundingAdamW(held, lr=1e-2, seed=3)
    give_gradients([held], 0)
    first.step()
    others = copies(held)
    second = StochasticRoundingAdamW(others)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    give_gradients([held, others], 1)
    first.step()
    second.step()
    for p, q in zip(held, others, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(first.state[p]["exp_avg_sq"], second.state[q]["exp_avg_sq"])


@pytest.mark.parametrize("remake", [lambda made: made, copy.deepcopy])
def test_a_part_of_the_parameters_is_rounded_as_in_the_whole(path, remake) -> None:
    held = parameters()
    whole = StochasticRoundingAdamW(held, lr=1e-2, seed=3)
    part = remake(StochasticRoundingAdamW(copies(held), lr=1e-2, seed=3))
    (group,) = part.param_groups
    give_gradients([held, group["params"]], 0)
    del group["params"][0]
    whole.step()
    part.step()
    for p, q in zip(held[1:], group["params"], strict=True):
        assert torch.equal(p, q)


def test_checkpoints_continue_bit_for_bit(path, tmp_path) -> None:
    def build(seed: int) -> tuple[nn.Module, StochasticRoundingAdamW]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16)).bfloat16()
        return model, StochasticRoundingAdamW(model.parameters(), lr=1e-2, seed=seed)

    (model, optimizer), (other, restored) = build(0), build(1)
    for step in range(4):
        if step == 2:
            folder = write_checkpoint(
                tmp_path / "c", model=model, optimizer=optimizer, global_step=2
            )
            read_checkpoint(folder, model=other, optimizer=restored)
        give_gradients([list(model.parameters()), list(other.parameters())], step)
        optimizer.step()
        restored.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert restored.param_groups[0]["seed"] == 0
