"""Training equals plain PyTorch: accumulation, replicas, reductions, clipping, every optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.tools.emulator.toys import (
    batch,
    largest_difference,
    mlp,
    reference_step,
    two_ipus,
)

MICRO, STEPS = 2, 5
GIVEN = {
    "SGD": ({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, torch.optim.SGD),
    "Adam": ({"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}, torch.optim.Adam),
    "AdamW": ({"lr": 0.01, "weight_decay": 0.1, "eps": 1e-6}, torch.optim.AdamW),
    "RMSprop": ({"lr": 0.01, "alpha": 0.9, "momentum": 0.5}, torch.optim.RMSprop),
}


def options_for(poptorch, *, replicas=1, accumulation=4, iterations=1):
    options = poptorch.Options().replicationFactor(replicas).deviceIterations(iterations)
    options.Training.gradientAccumulation(accumulation)
    return options


def compare(poptorch, optimizer, reference, *, replicas, accumulation, clip=None, mean=True):
    """Train both and return the largest difference of a weight."""
    model = two_ipus(poptorch, mlp())
    plain = mlp()
    options = options_for(poptorch, replicas=replicas, accumulation=accumulation)
    if not mean:
        kind = poptorch.ReductionType.Sum
        options.Training.accumulationAndReplicationReductionType(kind)
    executor = poptorch.trainingModel(model, options, optimizer(model))
    plain_optimizer = reference(plain)
    for step in range(STEPS):
        inputs = batch(MICRO * replicas * accumulation, seed=step)
        executor(*inputs)
        reference_step(
            plain,
            plain_optimizer,
            inputs,
            micro_batches=replicas * accumulation,
            mean=mean,
            clip=clip,
        )
    return largest_difference(model, plain)


@pytest.mark.parametrize("name", list(GIVEN))
@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [4, 16])
def test_five_steps_equal_torch(poptorch, name, replicas, accumulation) -> None:
    values, torch_class = GIVEN[name]
    difference = compare(
        poptorch,
        lambda m: getattr(poptorch.optim, name)(m.parameters(), **values),
        lambda m: torch_class(m.parameters(), **values),
        replicas=replicas,
        accumulation=accumulation,
    )
    assert difference <= 1e-6


@pytest.mark.parametrize("name", list(GIVEN))
def test_torch_optimizers_are_taken_too(poptorch, name) -> None:
    values, torch_class = GIVEN[name]
    make = lambda m: torch_class(m.parameters(), **values)  # noqa: E731
    assert compare(poptorch, make, make, replicas=2, accumulation=4) <= 1e-6


def test_clipping_is_over_all_gradients(poptorch) -> None:
    difference = compare(
        poptorch,
        lambda m: poptorch.optim.AdamW(
            m.parameters(), lr=0.01, max_grad_norm=0.05, loss_scaling=64.0
        ),
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
        replicas=2,
        accumulation=4,
        clip=0.05,
    )
    assert difference <= 2e-6


def test_sum_reduction(poptorch) -> None:
    difference = compare(
        poptorch,
        lambda m: poptorch.optim.SGD(m.parameters(), lr=0.01, loss_scaling=2.0),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.01),
        replicas=2,
        accumulation=4,
        mean=False,
    )
    assert difference <= 1e-6


@pytest.mark.parametrize("variant", [{"nesterov": True}, {"use_combined_accum": True}])
def test_sgd_variants(poptorch, variant) -> None:
    values = {"lr": 0.05, "momentum": 0.9}
    nesterov = variant.get("nesterov", False)
    difference = compare(
        poptorch,
        lambda m: poptorch.optim.SGD(m.parameters(), **values, **variant),
        lambda m: torch.optim.SGD(m.parameters(), **values, nesterov=nesterov),
        replicas=1,
        accumulation=4,
    )
    assert difference <= 1e-6


def test_centered_rmsprop(poptorch) -> None:
    values = {"lr": 0.01, "centered": True, "weight_decay": 0.1}
    difference = compare(
        poptorch,
        lambda m: poptorch.optim.RMSprop(m.parameters(), **values),
        lambda m: torch.optim.RMSprop(m.parameters(), **values),
        replicas=1,
        accumulation=4,
    )
    assert difference <= 1e-6


def single_step(poptorch, make):
    """Return the weight before, its gradient, and the weight after one update."""

    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))

        def forward(self, x):
            return poptorch.identity_loss(self.w * x, "sum")

    model = Weight()
    before = model.w.detach().clone()
    gradient = torch.tensor([0.5, 0.25, -1.0])
    options = poptorch.Options()
    executor = poptorch.trainingModel(model, options, make(model.parameters()))
    executor(gradient[None])
    return before, gradient, model.w.detach().clone()


@pytest.mark.parametrize("bias", [True, False])
def test_lamb_formula(poptorch, bias) -> None:
    before, gradient, after = single_step(
        poptorch,
        lambda p: poptorch.optim.LAMB(
            p, lr=0.1, weight_decay=0.01, bias_correction=bias, max_weight_norm=2.0
        ),
    )
    first, second = 0.1 * gradient, 0.001 * gradient**2
    if bias:
        first, second = first / 0.1, second / 0.001
    change = first / (second.sqrt() + 1e-8) + 0.01 * before
    ratio = min(before.norm().item(), 2.0) / change.norm()
    torch.testing.assert_close(after, before - 0.1 * ratio * change)


def test_rmsprop_tf_variant(poptorch) -> None:
    before, gradient, after = single_step(
        poptorch, lambda p: poptorch.optim.RMSprop(p, lr=0.1, eps=0.1, use_tf_variant=True)
    )
    change = gradient / (0.01 * gradient**2 + 0.1).sqrt()
    torch.testing.assert_close(after, before - 0.1 * change)


def test_dampening_applies_to_the_first_step_too(poptorch) -> None:
    before, gradient, after = single_step(
        poptorch, lambda p: poptorch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5)
    )
    torch.testing.assert_close(after, before - 0.1 * 0.5 * gradient)


def test_adamw_corrects_the_bias_even_when_told_not_to(poptorch, caplog) -> None:
    make = poptorch.optim.AdamW
    _, _, off = single_step(poptorch, lambda p: make(p, lr=0.1, bias_correction=False))
    assert "AdamW(bias_correction=False) has no effect on the device" in caplog.text
    _, _, on = single_step(poptorch, lambda p: make(p, lr=0.1))
    assert torch.equal(on, off)


def test_every_device_iteration_is_an_update(poptorch) -> None:
    model, plain = mlp(), mlp()
    options = options_for(poptorch, iterations=3, accumulation=2)
    executor = poptorch.trainingModel(
        model, options, poptorch.optim.SGD(model.parameters(), lr=0.1)
    )
    inputs = batch(3 * 2 * MICRO)
    executor(*inputs)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for part in range(3):
        size = 2 * MICRO
        piece = [value[part * size : (part + 1) * size] for value in inputs]
        reference_step(plain, optimizer, piece, micro_batches=2)
    assert largest_difference(model, plain) <= 1e-6


def test_groups_have_values_of_their_own(poptorch) -> None:
    def groups(model):
        return [
            {"params": model.first.parameters(), "weight_decay": 0.0},
            {"params": model.last.parameters(), "lr": 0.1},
        ]

    difference = compare(
        poptorch,
        lambda m: poptorch.optim.AdamW(groups(m), lr=0.01, weight_decay=0.5),
        lambda m: torch.optim.AdamW(groups(m), lr=0.01, weight_decay=0.5),
        replicas=1,
        accumulation=4,
    )
    assert difference <= 1e-6


def test_frozen_parameters_stay(poptorch) -> None:
    model = mlp()
    model.first.requires_grad_(False)
    before = copy.deepcopy(model)
    optimizer = poptorch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    poptorch.trainingModel(model, None, optimizer)(*batch(2))
    assert torch.equal(model.first.weight, before.first.weight)
    assert not torch.equal(model.last.weight, before.last.weight)


def test_buffers_are_per_replica(poptorch) -> None:
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.last = nn.Linear(6, 3)

        def forward(self, x, target):
            return nn.functional.cross_entropy(self.last(self.norm(x)), target)

    model, plain = Norm(), Norm()
    options = options_for(poptorch, replicas=2, accumulation=2)
    x, target = batch(2 * 2 * 4)
    poptorch.trainingModel(model, options)(x, target)
    for step in range(2):
        plain.norm(x[step * 8 : step * 8 + 4])
    torch.testing.assert_close(model.norm.running_mean.clone(), plain.norm.running_mean)
    assert int(model.norm.num_batches_tracked) == 2


def test_half_precision_model_and_accumulators(poptorch) -> None:
    model = mlp().half()
    optimizer = poptorch.optim.AdamW(
        model.parameters(),
        lr=0.01,
        loss_scaling=128.0,
        accum_type=torch.float16,
        first_order_momentum_accum_type=torch.float16,
    )
    before = copy.deepcopy(model)
    executor = poptorch.trainingModel(model, options_for(poptorch), optimizer)
    strategy = executor.options.Training.meanAccumulationAndReplicationReductionStrategy
    assert strategy is poptorch.MeanReductionStrategy.Running
    x, target = batch(8)
    executor(x.half(), target)
    assert 0 < largest_difference(model, before) < 0.011
    state = optimizer.state_dict()["ipu_state"]
    assert state["Accl1___first.weight"].dtype is torch.float16
    assert state["Accl2___first.weight"].dtype is torch.float32


def test_running_mean_does_not_overflow_float16(poptorch) -> None:
    """The sum of four scaled gradients is above 65504, their mean is not."""

    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return poptorch.identity_loss(self.w * x, "sum")

    def trained(dtype):
        model = Weight()
        optimizer = poptorch.optim.SGD(
            model.parameters(), lr=0.5, loss_scaling=30000.0, accum_type=dtype
        )
        poptorch.trainingModel(model, options_for(poptorch, replicas=2), optimizer)(torch.ones(8))
        return model.w.item()

    assert trained(torch.float32) == pytest.approx(0.5)
    assert trained(torch.float16) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("replicas", [1, 2])
def test_running_strategy_is_the_same_mean(poptorch, replicas) -> None:
    model, plain = mlp(), mlp()
    options = options_for(poptorch, replicas=replicas)
    options.Training.setMeanAccumulationAndReplicationReductionStrategy(
        poptorch.MeanReductionStrategy.Running
    )
    optimizer = poptorch.optim.SGD(model.parameters(), lr=0.1)
    inputs = batch(4 * replicas)
    poptorch.trainingModel(model, options, optimizer)(*inputs)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    reference_step(plain, reference, inputs, micro_batches=4 * replicas)
    assert largest_difference(model, plain) <= 1e-6


def test_dropout_draws_from_torch_or_by_micro_batch(poptorch) -> None:
    def losses(hook, *, seed=3, first=0):
        model = mlp(dropout=0.5)
        options = options_for(poptorch, accumulation=4).outputMode(poptorch.OutputMode.All)
        frozen = poptorch.optim.SGD(model.parameters(), lr=0.0)
        executor = poptorch.trainingModel(model, options, frozen)
        executor.setSeedHook(hook)
        torch.manual_seed(seed)
        torch.rand(first)
        executor(*batch(8))
        return executor(*batch(8))[1]

    assert torch.equal(losses(None), losses(None))
    assert not torch.equal(losses(None), losses(None, seed=4))
    keyed = lambda update, step, replica: update * 100 + step * 10 + replica  # noqa: E731
    assert torch.equal(losses(keyed), losses(keyed, seed=9, first=5))
    assert losses(keyed).unique().numel() == 4


def test_modes_are_those_of_compilation(poptorch) -> None:
    model = mlp(dropout=0.5)
    executor = poptorch.trainingModel(model, options_for(poptorch))
    executor.compile(*batch(8))
    model.eval()
    torch.manual_seed(0)
    first = executor(*batch(8))[0]
    torch.manual_seed(1)
    second = executor(*batch(8))[0]
    assert not torch.equal(first, second)
    assert not model.training
