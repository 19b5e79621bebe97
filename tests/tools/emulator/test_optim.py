"""Optimizers: keys, variable and constant values, state, and what cannot change."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from ipu_pipeline_emulator.optim_base import device_values
from tests.tools.emulator.toys import batch, largest_difference, mlp


def wrapped(poptorch, optimizer, model):
    return poptorch.trainingModel(model, poptorch.Options(), optimizer)


def test_given_is_variable_and_omitted_is_constant(poptorch) -> None:
    model = mlp()
    (group,) = device_values(poptorch.optim.AdamW(model.parameters()))["groups"]
    assert group["learningRate"] == (0.001, True)
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.001, betas=(0.9, 0.999))
    values = device_values(optimizer)
    (group,) = values["groups"]
    assert group["learningRate"] == (0.001, False)
    assert group["beta1"] == (0.9, False)
    assert group["eps"] == (1e-8, True)
    assert values["lossScaling"] == (1.0, True)
    optimizer.variable_attrs.markAsConstant("lr")
    optimizer.variable_attrs.markAsVariable("loss_scaling")
    values = device_values(optimizer)
    assert values["groups"][0]["learningRate"][1]
    assert not values["lossScaling"][1]
    with pytest.raises(KeyError, match="momentum is not a value of this optimizer"):
        optimizer.variable_attrs.markAsVariable("momentum")


def test_torch_values_are_constant_when_they_are_the_default(poptorch) -> None:
    values = device_values(torch.optim.AdamW(mlp().parameters(), weight_decay=0.5))
    assert values["optimizer_type"] == "ADAMW"
    (group,) = values["groups"]
    assert group["learningRate"] == (0.001, False)
    assert group["weightDecay"] == (0.5, False)
    assert group["beta2"] == (0.999, True)
    assert device_values(torch.optim.Adam(mlp().parameters()))["optimizer_type"] == "ADAM"


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("AdamW", {"learning_rate": 1.0}, TypeError, "learning_rate"),
        ("AdamW", {"accum_type": torch.float64}, AssertionError, "accum_type must be"),
        ("AdamW", {"max_grad_norm": 0.0}, AssertionError, "max_grad_norm must be above 0"),
    ],
)
def test_wrong_keys(poptorch, name, kwargs, error, message) -> None:
    with pytest.raises(error, match=message):
        getattr(poptorch.optim, name)(mlp().parameters(), **kwargs)


def test_unsupported_optimizers(poptorch) -> None:
    model = mlp()
    with pytest.raises(AssertionError, match="Unsupported optimizer type Adagrad"):
        wrapped(poptorch, torch.optim.Adagrad(model.parameters()), model)
    with pytest.raises(ValueError, match="amsgrad=True are not supported"):
        wrapped(poptorch, torch.optim.AdamW(model.parameters(), amsgrad=True), model)
    groups = [{"params": [p], "centered": i == 0} for i, p in enumerate(model.parameters())]
    with pytest.raises(ValueError, match="'centered' must be the same in all groups"):
        wrapped(poptorch, poptorch.optim.RMSprop(groups, lr=0.1), model)


def test_unexpected_group_keys_warn(poptorch, caplog) -> None:
    model = mlp()
    optimizer = poptorch.optim.SGD([{"params": model.parameters(), "loss_scaling": 2}], lr=0.1)
    wrapped(poptorch, optimizer, model)(*batch(2))
    assert "Ignoring unexpected attributes of optimizer group 0: ['loss_scaling']" in caplog.text


def test_maximize_is_ignored_and_said_so(poptorch, caplog) -> None:
    model = mlp()
    optimizer = poptorch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    wrapped(poptorch, optimizer, model)(*batch(2))
    assert "maximize of optimizer group 0 is ignored by the device" in caplog.text


def test_step_is_refused(poptorch) -> None:
    with pytest.raises(RuntimeError, match="do not update weights on the host"):
        poptorch.optim.SGD(mlp().parameters(), lr=0.1).step()


def test_default_optimizer_is_sgd(poptorch) -> None:
    model, plain = mlp(), mlp()
    poptorch.trainingModel(model)(*batch(2))
    plain(*batch(2))[1].backward()
    torch.optim.SGD(plain.parameters(), lr=0.01).step()
    assert largest_difference(model, plain) <= 1e-7


def test_parameters_and_groups_must_match(poptorch) -> None:
    model = mlp()
    with pytest.raises(poptorch.Error, match="is not a parameter of the model"):
        wrapped(poptorch, poptorch.optim.SGD(mlp().parameters(), lr=0.1), model)(*batch(2))
    model = mlp()
    executor = wrapped(poptorch, poptorch.optim.SGD(model.last.parameters(), lr=0.1), model)
    with pytest.raises(poptorch.Error, match=r"in no group of the optimizer: first.weight"):
        executor(*batch(2))


def test_a_schedule_needs_set_optimizer(poptorch) -> None:
    model = mlp()
    optimizer = poptorch.optim.SGD(model.parameters(), lr=0.0)
    executor = wrapped(poptorch, optimizer, model)
    before = mlp()
    optimizer.param_groups[0]["lr"] = 0.1
    executor.setOptimizer(optimizer)
    executor(*batch(2))
    moved = largest_difference(model, before)
    assert moved > 0
    optimizer.param_groups[0]["lr"] = 0.0
    executor(*batch(2))
    assert largest_difference(model, before) > moved
    executor.setOptimizer(optimizer)
    after = [p.detach().clone() for p in model.parameters()]
    executor(*batch(2))
    assert all(torch.equal(a, b) for a, b in zip(after, model.parameters()))


def test_torch_schedulers_drive_it(poptorch) -> None:
    model = mlp()
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    executor = wrapped(poptorch, optimizer, model)
    executor(*batch(2))
    optimizer._opt_called = True  # the device steps, not the object: torch would warn
    schedule.step()
    executor.setOptimizer(optimizer)
    assert device_values(optimizer)["groups"][0]["learningRate"] == (0.5, False)


def test_what_cannot_change_after_compilation(poptorch) -> None:
    model = mlp()
    make = poptorch.optim.AdamW
    executor = wrapped(poptorch, make(model.parameters(), lr=0.1), model)
    executor(*batch(2))
    parameters = list(model.parameters())
    for other, message in (
        (poptorch.optim.SGD(parameters, lr=0.1), "optimizer_type from ADAMW to SGD"),
        (make(parameters, lr=0.1, max_grad_norm=1.0), "maxGradNorm from inf to 1.0"),
        (make(parameters), "learningRate from variable to constant"),
        (make([{"params": [p]} for p in parameters], lr=0.1), "number of groups from 1 to 4"),
    ):
        with pytest.raises(poptorch.Error, match=f"setOptimizer.. cannot change .*{message}"):
            executor.setOptimizer(other)
    changed = make(parameters, lr=0.1)
    changed.param_groups[0]["eps"] = 1e-3
    with pytest.raises(poptorch.Error, match=r"the constant eps from 1e-08 to 0.001"):
        executor.setOptimizer(changed)
    with pytest.raises(ValueError, match="accumulation type cannot change"):
        executor.setOptimizer(make(parameters, lr=0.1, accum_type=torch.float16))
    with pytest.raises(AssertionError, match=r"setOptimizer\(\) needs a training model"):
        poptorch.inferenceModel(nn.Identity()).setOptimizer(changed)


def test_state_dict_restores_training(poptorch) -> None:
    def train(model, optimizer, first, last):
        executor = wrapped(poptorch, optimizer, model)
        for step in range(first, last):
            executor(*batch(4, seed=step))
        executor.detachFromDevice()

    whole = mlp()
    train(whole, poptorch.optim.AdamW(whole.parameters(), lr=0.1), 0, 4)

    model = mlp()
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    assert {"ipu_state", "ipu_param", "state", "param_groups"} <= set(state)

    resumed = mlp(seed=5)
    resumed.load_state_dict(model.state_dict())
    optimizer = poptorch.optim.AdamW(resumed.parameters(), lr=0.1)
    optimizer.load_state_dict(pickle.loads(pickle.dumps(state)))
    train(resumed, optimizer, 2, 4)
    assert largest_difference(resumed, whole) == 0.0


def test_foreign_states_are_refused(poptorch) -> None:
    model = mlp()
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="Only the state of a poptorch optimizer"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    state = optimizer.state_dict()
    executor = wrapped(poptorch, optimizer, model)
    optimizer.load_state_dict({**state, "ipu_state": {"Accl1___other": torch.ones(1)}})
    with pytest.raises(poptorch.Error, match="state Accl1___other belongs to no parameter"):
        executor(*batch(2))
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1)
    state["ipu_state"] = {"Accl1___first.weight": torch.ones(1)}
    optimizer.load_state_dict(state)
    other = mlp()
    optimizer = poptorch.optim.AdamW(other.parameters(), lr=0.1)
    optimizer.load_state_dict(state)
    with pytest.raises(AssertionError, match=r"state of first.weight has another shape"):
        wrapped(poptorch, optimizer, other)(*batch(2))
