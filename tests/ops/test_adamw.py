from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ipu_pipeline.checkpoint import read_checkpoint, write_checkpoint
from ipu_pipeline.ops import extension
from ipu_pipeline.ops.adamw import AdamW
from ipu_pipeline.stages.training import apply_update

NEEDS_LIBRARY = pytest.mark.skipif(
    not extension.state().usable, reason="the kernels are not built or switched off"
)
PATHS = [pytest.param("library", marks=NEEDS_LIBRARY), "plain"]
SHAPES = [(3,), (17, 33), (70_001,), (0,), (1,), (64, 64), ()]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> str:
    monkeypatch.setattr(extension, "available", lambda: request.param == "library")
    return request.param


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0) -> list[nn.Parameter]:
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


def states(optimizer: torch.optim.Optimizer, name: str) -> list[Tensor]:
    return [optimizer.state[p][name] for p in optimizer.param_groups[0]["params"]]


# ------------------------------------------------------------------ the update


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_float32_is_torchs_adamw_up_to_rounding(path, maximize, beta1) -> None:
    ours, theirs = parameters(), parameters()
    settings = {
        "lr": 1e-3, "weight_decay": 0.05, "betas": (beta1, 0.999), "maximize": maximize
    }  # fmt: skip
    optimizer = AdamW(ours, **settings)
    expected = torch.optim.AdamW(theirs, foreach=False, **settings)
    for step in range(100):
        give_gradients([ours, theirs], step)
        optimizer.step()
        expected.step()
    for p, q in zip(ours, theirs, strict=True):
        ulp = 2.0**-23
        # Weights near zero are differences: a few ulp of the size of what was added up.
        assert torch.all((p - q).abs() <= 4 * ulp * q.abs().clamp_min(0.1))
        torch.testing.assert_close(
            optimizer.state[p]["exp_avg_sq"], expected.state[q]["exp_avg_sq"], rtol=4 * ulp, atol=0
        )
        scale = expected.state[q]["exp_avg_sq"].sqrt()
        gap = optimizer.state[p]["exp_avg"] - expected.state[q]["exp_avg"]
        assert torch.all(gap.abs() <= 16 * ulp * scale)
        assert float(optimizer.state[p]["step"]) == 100


def test_float64_is_torchs_adamw_up_to_rounding(path) -> None:
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    optimizer = AdamW(ours, lr=1e-2)
    expected = torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    for step in range(20):
        give_gradients([ours, theirs], step)
        optimizer.step()
        expected.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)
        assert optimizer.state[p]["exp_avg"].dtype == torch.float64


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [False, True])
def test_threads_do_not_change_bits(dtype, stochastic) -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            held = parameters(dtype)
            optimizer = AdamW(held, lr=1e-3, stochastic_rounding=stochastic)
            for step in range(3):
                give_gradients([held], step)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        results.append([*held, *states(optimizer, "exp_avg"), *states(optimizer, "exp_avg_sq")])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(path, dtype) -> None:
    torch.manual_seed(0)
    base = torch.randn(40, 30).to(dtype)
    gradient = torch.randn(40, 30).to(dtype)
    straight = nn.Parameter(base.clone())
    turned = nn.Parameter(base.t().contiguous().t())
    sliced = nn.Parameter(base.repeat(1, 2)[:, :30])
    odd_gradient = nn.Parameter(base.clone())
    held = [straight, turned, sliced, odd_gradient]
    optimizer = AdamW(held, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        for p in (straight, turned, sliced):
            p.grad = gradient.clone()
        odd_gradient.grad = gradient.repeat(1, 2)[:, :30]
        turned.grad = gradient.t().contiguous().t()
        optimizer.step()
    assert not turned.is_contiguous()
    assert not sliced.is_contiguous()
    for p in held[1:]:
        assert torch.equal(p, straight)
    assert not torch.equal(straight, base)


def test_parameters_without_gradient_are_skipped(path) -> None:
    held = parameters()
    give_gradients([held], 0)
    held[1].grad = None
    before = [p.detach().clone() for p in held]
    optimizer = AdamW(held, lr=1e-2)
    optimizer.step()
    assert torch.equal(held[1], before[1])
    assert held[1] not in optimizer.state
    assert not torch.equal(held[2], before[2])
    optimizer.zero_grad()
    optimizer.step()
    assert float(optimizer.state[held[2]]["step"]) == 1


def test_autograd_notices_the_change(path) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdamW([weight])
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure_recomputes_with_gradients(path) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight * weight).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] == 3.0
    assert losses[2] < losses[1] < losses[0]


def test_groups_schedulers_and_tensor_learning_rates(path) -> None:
    def build(make: Any, held: list[nn.Parameter]) -> Any:
        groups = [
            {"params": held[:2], "weight_decay": 0.3},
            {"params": held[2:], "lr": torch.tensor(2e-2, dtype=torch.float64)},
        ]
        optimizer = make(groups, lr=1e-2, weight_decay=0.0)
        rates = [lambda n: 1 / (n + 1), lambda n: 1 / (n + 2)]
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)

    ours, theirs = parameters(), parameters()
    runs = [build(AdamW, ours), build(torch.optim.AdamW, theirs)]
    for step in range(5):
        give_gradients([ours, theirs], step)
        for optimizer, scheduler in runs:
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_apply_update_works_with_it(path) -> None:
    ours, theirs = parameters(), parameters()
    give_gradients([ours, theirs], 0)
    for held, make in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        result = apply_update(make(held, lr=0.1), held, loss_scaling=4.0, max_grad_norm=0.5)
        assert not result.skipped
        assert all(p.grad is None for p in held)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "gradient"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_gradients_of_another_type(path, weight, gradient) -> None:
    """torch lets ``grad_dtype`` differ from the weight's."""
    held = nn.Parameter(torch.ones(5, dtype=weight))
    held.grad_dtype = None
    held.grad = torch.full((5,), 0.25, dtype=gradient)
    AdamW([held], lr=0.5, weight_decay=0.0).step()
    torch.testing.assert_close(held.detach(), torch.full((5,), 0.5, dtype=weight))


# ------------------------------------------------------------------ refusals


def test_sparse_gradients_are_refused_before_anything_changes(path) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    optimizer = AdamW([{"params": [other]}, {"params": table.parameters()}])
    table(torch.tensor([1, 2])).sum().backward()
    message = r"parameter 0 of group 1, of shape \(5, 3\), has a gradient of layout .*sparse_coo"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(other, torch.ones(2))
    assert len(optimizer.state) == 0


def test_amsgrad_is_refused_wherever_it_comes_from() -> None:
    match = r"does not keep the largest second moment.*use torch.optim.AdamW"
    with pytest.raises(ValueError, match=match):
        AdamW(parameters(), amsgrad=True)
    optimizer = AdamW(parameters())
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": parameters(), "amsgrad": True})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(torch.optim.AdamW(parameters(), amsgrad=True).state_dict())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_other_types_are_refused(dtype) -> None:
    held = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
    with pytest.raises(ValueError, match=rf"shape \(2, 3\) is {dtype}; this AdamW updates"):
        AdamW([held])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        AdamW(parameters(), lr=-1)


# ------------------------------------------------------------------ states and checkpoints


@pytest.mark.parametrize("their_way", ["foreach", "fused"])
def test_state_dicts_go_to_torch_and_back(path, their_way) -> None:
    start = parameters()
    ours, theirs, back = start, copies(start), copies(start)
    first = AdamW(ours, lr=1e-2, betas=(0.8, 0.9))
    give_gradients([ours], 0)
    first.step()
    second = torch.optim.AdamW(theirs, lr=3.0, **{their_way: True})
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    third = AdamW(back, lr=7.0, stochastic_rounding=True, seed=5)
    third.load_state_dict(copy.deepcopy(torch.optim.AdamW(copies(start)).state_dict()))
    group = third.param_groups[0]
    assert (group["stochastic_rounding"], group["seed"], group["lr"]) == (True, 5, 1e-3)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    give_gradients([ours, theirs], 1)
    first.step()
    second.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    for p, q in zip(theirs, back, strict=True):
        q.data.copy_(p.data)
    give_gradients([theirs, back], 2)
    second.step()
    third.step()
    torch.testing.assert_close(theirs, back, rtol=1e-5, atol=1e-6)
    assert third.param_groups[0]["fused"] is None
    assert third.param_groups[0]["betas"] == (0.8, 0.9)


def test_float32_averages_of_16_bit_weights_survive_a_state_dict() -> None:
    held = parameters(torch.bfloat16)
    first = AdamW(held, lr=1e-2, stochastic_rounding=True, seed=3)
    give_gradients([held], 0)
    first.step()
    others = copies(held)
    second = AdamW(others)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    give_gradients([held, others], 1)
    first.step()
    second.step()
    for p, q in zip(held, others, strict=True):
        assert torch.equal(p, q)
        assert second.state[q]["exp_avg"].dtype == torch.float32
        assert torch.equal(first.state[p]["exp_avg_sq"], second.state[q]["exp_avg_sq"])


@pytest.mark.parametrize("remake", [lambda made: made, copy.deepcopy])
def test_a_part_of_the_parameters_is_rounded_as_in_the_whole(path, remake) -> None:
    held = parameters(torch.bfloat16)
    whole = AdamW(held, lr=1e-2, stochastic_rounding=True, seed=3)
    part = remake(AdamW(copies(held), lr=1e-2, stochastic_rounding=True, seed=3))
    (group,) = part.param_groups
    give_gradients([held, group["params"]], 0)
    del group["params"][0]
    whole.step()
    part.step()
    for p, q in zip(held[1:], group["params"], strict=True):
        assert torch.equal(p, q)


def test_16_bit_averages_from_torch_stay_so(path) -> None:
    held, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    theirs = torch.optim.AdamW(others, lr=1e-2)
    give_gradients([held, others], 0)
    theirs.step()
    ours = AdamW(held)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    ours.step()
    assert all(t.dtype == torch.bfloat16 for t in states(ours, "exp_avg_sq"))


def test_averages_follow_a_model_that_changes_its_type(path) -> None:
    model = nn.Linear(3, 3).bfloat16()
    optimizer = AdamW(model.parameters())
    source = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    source.step()
    optimizer.load_state_dict(source.state_dict())
    optimizer.zero_grad()
    model.float()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(t.dtype == torch.float32 for t in states(optimizer, "exp_avg"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_continue_bit_for_bit(path, dtype, tmp_path) -> None:
    def build(seed: int) -> tuple[nn.Module, AdamW]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16)).to(dtype)
        return model, AdamW(model.parameters(), lr=1e-2, stochastic_rounding=True, seed=seed)

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


def test_checkpoints_of_torchs_adamw_load(tmp_path) -> None:
    model = nn.Linear(4, 4)
    theirs = torch.optim.AdamW(model.parameters(), lr=0.3)
    give_gradients([list(model.parameters())], 0)
    theirs.step()
    folder = write_checkpoint(tmp_path / "c", model=model, optimizer=theirs, global_step=1)
    ours = AdamW(model.parameters(), seed=9)
    read_checkpoint(folder, model=model, optimizer=ours)
    group = ours.param_groups[0]
    assert (group["lr"], group["seed"], group["stochastic_rounding"]) == (0.3, 9, False)
    assert torch.equal(states(ours, "exp_avg")[0], states(theirs, "exp_avg")[0])


def test_a_copy_of_the_optimizer_steps_on_its_own(path) -> None:
    held = parameters()
    optimizer = AdamW(held, seed=4)
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["seed"] == 4
    give_gradients([held, twin.param_groups[0]["params"]], 0)
    optimizer.step()
    twin.step()
    for p, q in zip(held, twin.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
