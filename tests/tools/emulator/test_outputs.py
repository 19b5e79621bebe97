"""Order of samples, output modes, input groups and types of inputs and outputs."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn


class Echo(nn.Module):
    """Returns its inputs in a nest, with a scalar for each micro-batch."""

    def forward(self, x, scale=None, extra=None):
        del extra
        scaled = x if scale is None else x * scale
        return {"same": scaled, "pair": (x.sum(), [x.mean(dtype=torch.float64), None])}


def run(poptorch, *, iterations=1, replicas=1, mode=None, period=None, grouping=None, size=1):
    options = poptorch.Options().deviceIterations(iterations).replicationFactor(replicas)
    if mode is not None:
        options.outputMode(poptorch.OutputMode[mode], period)
    groups = replicas
    if grouping is not None:
        options.inputReplicaGrouping(grouping[0], poptorch.CommGroupType[grouping[1]])
        groups //= grouping[0]
    executor = poptorch.inferenceModel(Echo(), options)
    return executor(torch.arange(float(iterations * groups * size)))


def test_all_keeps_the_order_of_samples(poptorch) -> None:
    found = run(poptorch, iterations=3, replicas=2, size=2)
    assert found["same"].tolist() == list(map(float, range(12)))
    assert found["pair"][0].tolist() == [1.0, 5.0, 9.0, 13.0, 17.0, 21.0]
    assert found["pair"][1][0].dtype is torch.float32
    assert found["pair"][1][1] is None


def test_one_micro_batch_keeps_its_shape(poptorch) -> None:
    found = run(poptorch, size=3)
    assert found["same"].shape == (3,)
    assert found["pair"][0].dim() == 0


def test_final_is_the_last_of_every_replica(poptorch) -> None:
    found = run(poptorch, iterations=3, replicas=2, mode="Final", size=2)
    assert found["same"].tolist() == [8.0, 9.0, 10.0, 11.0]


def test_sum_is_per_replica(poptorch) -> None:
    found = run(poptorch, iterations=3, replicas=2, mode="Sum")
    assert found["same"].tolist() == [0.0 + 2 + 4, 1.0 + 3 + 5]


def test_every_n_counts_device_iterations(poptorch) -> None:
    found = run(poptorch, iterations=4, replicas=2, mode="EveryN", period=2)
    assert found["same"].tolist() == [2.0, 3.0, 6.0, 7.0]


def test_training_outputs_count_accumulation(poptorch) -> None:
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return poptorch.identity_loss(x * self.w, "sum")

    def losses(mode):
        options = poptorch.Options().deviceIterations(2).replicationFactor(2)
        options.Training.gradientAccumulation(2)
        options.outputMode(poptorch.OutputMode[mode])
        model = Loss()
        optimizer = poptorch.optim.SGD(model.parameters(), lr=0.0)
        return poptorch.trainingModel(model, options, optimizer)(torch.arange(8.0)).tolist()

    assert losses("All") == list(map(float, range(8)))
    assert losses("Final") == [6.0, 7.0] == losses("Default")
    assert losses("Sum") == [0.0 + 2 + 4 + 6, 1.0 + 3 + 5 + 7]


@pytest.mark.parametrize(
    ("kind", "expected"), [("Consecutive", [0, 0, 1, 1]), ("Orthogonal", [0, 1, 0, 1])]
)
def test_replicas_of_a_group_get_the_same_input(poptorch, kind, expected) -> None:
    found = run(poptorch, replicas=4, grouping=(2, kind))
    assert found["same"].tolist() == list(map(float, expected))


def test_types_of_the_device(poptorch) -> None:
    class Types(nn.Module):
        def forward(self, wide, double):
            assert double.dtype is torch.float32
            return wide, double

    wide = torch.tensor([2**40 + 5])
    out, double = poptorch.inferenceModel(Types())(wide, torch.ones(1, dtype=torch.float64))
    assert (out.dtype, int(out[0])) == (torch.int32, 5)
    assert double.dtype is torch.float32


def test_zero_dimensional_tensors_are_passed_whole(poptorch) -> None:
    options = poptorch.Options().deviceIterations(2)
    found = poptorch.inferenceModel(Echo(), options)(torch.arange(2.0), scale=torch.tensor(3.0))
    assert found["same"].tolist() == [0.0, 3.0]


def test_named_tuples_and_custom_dicts_keep_their_type(poptorch) -> None:
    pair = collections.namedtuple("pair", "a b")

    class Named(nn.Module):
        def forward(self, x):
            return pair(x, collections.OrderedDict(c=x + 1))

    found = poptorch.inferenceModel(Named(), poptorch.Options().deviceIterations(2))(torch.ones(2))
    assert isinstance(found.b, collections.OrderedDict)
    assert found.b["c"].tolist() == [2.0, 2.0]


def test_wrong_batch_dimension(poptorch) -> None:
    options = poptorch.Options().deviceIterations(2).replicationFactor(2)
    with pytest.raises(
        AssertionError,
        match=r"Invalid batch dimension: input 0 has shape \(6,\), but dim 0 must be a multiple "
        r"of 4: deviceIterations \(2\) x gradientAccumulation \(1\) x replicationFactor \(2\)",
    ):
        poptorch.inferenceModel(Echo(), options)(torch.ones(6))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.ones(3),), {}),
        ((torch.ones(2, dtype=torch.int32),), {}),
        ((torch.ones(2), torch.tensor(1.0)), {}),
        ((torch.ones(2),), {"extra": "b"}),
        ((torch.ones(2),), {"extra": {"k": 1}}),
    ],
)
def test_later_calls_must_be_the_same(poptorch, args, kwargs) -> None:
    executor = poptorch.inferenceModel(Echo())
    executor(torch.ones(2))
    executor(x=torch.zeros(2))
    with pytest.raises(poptorch.Error, match="The inputs differ from those the model was compiled"):
        executor(*args, **kwargs)


def test_structures_of_inputs(poptorch) -> None:
    class Nest(nn.Module):
        def forward(self, nest):
            return nest["a"][0] + nest["a"][1] * nest["n"]

    executor = poptorch.inferenceModel(Nest())
    nest = {"a": (torch.ones(2), torch.ones(2)), "n": 2}
    assert executor(nest).tolist() == [3.0, 3.0]
    with pytest.raises(poptorch.Error, match="inputs differ"):
        executor({**nest, "n": 3})
    with pytest.raises(poptorch.Error, match="inputs differ"):
        executor({"a": [*nest["a"]], "n": 2})
