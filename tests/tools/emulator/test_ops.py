"""Operations: types, what they compute on the CPU, what is recorded."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn


class Function(nn.Module):
    """A module around a function and a weight."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 4))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight)


def run(poptorch, function, x=None):
    executor = poptorch.inferenceModel(Function(function))
    return executor(torch.ones(2, 6) if x is None else x), executor


def test_recomputation_checkpoint(poptorch) -> None:
    a, b = torch.ones(1), torch.zeros(1)
    assert poptorch.recomputationCheckpoint(a) is a
    assert poptorch.recomputationCheckpoint(a, b) == (a, b)
    assert poptorch.recomputationCheckpoint([a, b]) == [a, b]
    with pytest.raises(ValueError, match="recomputationCheckpoint takes tensors"):
        poptorch.recomputationCheckpoint(a, 3)
    with pytest.raises(ValueError, match="recomputationCheckpoint takes tensors"):
        poptorch.recomputationCheckpoint({"a": a})
    _, executor = run(poptorch, lambda x, w: poptorch.recomputationCheckpoint(x @ w, x)[0])
    assert executor.program.blocks[0].checkpoints == 2


@pytest.mark.parametrize(("mode", "factor"), [("InputChannels", 2), ("OutputChannels", 4)])
def test_serialized_matmul_is_a_product(poptorch, mode, factor) -> None:
    chosen = poptorch.MatMulSerializationMode[mode]
    x = torch.randn(2, 6)
    out, executor = run(poptorch, lambda x, w: poptorch.serializedMatMul(x, w, chosen, factor), x)
    assert torch.equal(out, x @ torch.ones(6, 4))
    (made,) = executor.program.blocks[0].serialized
    assert (made.mode, made.factor, made.lhs, made.rhs) == (chosen.value, factor, (2, 6), (6, 4))


@pytest.mark.parametrize(
    ("mode", "factor", "axis"),
    [("InputChannels", 3, "m of length 2"), ("ReducingDim", 4, "n of length 6")]
    + [("OutputChannels", factor, "p of length 4") for factor in (3, 0)],
)
def test_factor_divides_the_axis(poptorch, mode, factor, axis) -> None:
    chosen = poptorch.MatMulSerializationMode[mode]
    with pytest.raises(poptorch.Error, match=f"serialisation factor {factor} .*axis {axis}"):
        run(poptorch, lambda x, w: poptorch.serializedMatMul(x, w, chosen, factor))


def test_serialized_matmul_refusals(poptorch) -> None:
    mode = poptorch.MatMulSerializationMode
    a = torch.ones(2, 2)
    for args in (("a", a, mode.Disabled), (a, a, "output_channels"), (a, a, mode.Disabled, 2.0)):
        with pytest.raises(AssertionError, match=r"Unexpected type .*serializedMatMul"):
            poptorch.serializedMatMul(*args)
    with pytest.raises(AssertionError, match="keep_precision"):
        poptorch.serializedMatMul(a, a, mode.Disabled, 0, 1)
    with pytest.raises(poptorch.Error, match=r"rank 2 or 3, lhs has shape \(1, 1, 2, 6\)"):
        run(
            poptorch,
            lambda x, w: poptorch.serializedMatMul(x, w, mode.OutputChannels, 2),
            torch.ones(1, 1, 2, 6),
        )
    # Outside a program nothing is checked: plain matmul.
    assert poptorch.serializedMatMul(a, a, mode.OutputChannels, 3).shape == (2, 2)


@pytest.mark.parametrize(("reduction", "value"), [("sum", 6.0), ("mean", 2.0)])
def test_identity_loss(poptorch, reduction, value) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    assert poptorch.identity_loss(x, reduction).item() == value
    assert torch.equal(poptorch.identity_loss(x, "none"), x)
    assert torch.equal(poptorch.identity_loss(torch.tensor([1]), "none"), torch.tensor([1]))
    with pytest.raises(AssertionError, match="Unsupported reduction type 'max'"):
        poptorch.identity_loss(x, "max")


def test_hints_return_the_tensor(poptorch) -> None:
    x = torch.ones(2)
    assert poptorch.nop(x) is x
    assert poptorch.set_available_memory(x, 0.2) is x
    assert poptorch.ipu_print_tensor(x, "title") is x
    off = poptorch.OverlapMode.NoOverlap
    assert poptorch.set_overlap_for_input([x], off) == [x]
    assert poptorch.set_overlap_for_output(x, off) is x
    for call in (
        lambda: poptorch.nop(1),
        lambda: poptorch.set_available_memory(1, 0.2),
        lambda: poptorch.set_available_memory(x, 1),
        lambda: poptorch.ipu_print_tensor(1),
        lambda: poptorch.ipu_print_tensor(x, 1),
        lambda: poptorch.set_overlap_for_input(x, 1),
        lambda: poptorch.set_overlap_for_output(x, 1),
        lambda: poptorch.NameScope(1),
        lambda: poptorch.Attribute(__outline=1),
        lambda: poptorch.Attribute(__outline={"layer": 1}),
    ):
        with pytest.raises(AssertionError, match="Unexpected type"):
            call()


def test_contexts(poptorch) -> None:
    def scoped(x, w):
        with poptorch.NameScope("a"), poptorch.MultiConv():
            with poptorch.Attribute(__outline={"layer": "embedding"}):
                return x @ w

    _, executor = run(poptorch, scoped)
    assert executor.program.blocks[0].attributes == [("__outline", "layer", "embedding")]


def test_dynamic_slices(poptorch) -> None:
    x = torch.arange(6)
    assert poptorch.dynamic_slice(x, 0, torch.tensor(2), 3, 1).tolist() == [2, 3, 4]
    new = torch.tensor([9, 9])
    assert poptorch.dynamic_update(x, new, 0, torch.tensor(1), 2).tolist() == [0, 9, 9, 3, 4, 5]


def test_custom_op_is_zeros(poptorch, caplog) -> None:
    def call(x, w):
        return poptorch.custom_op([x], "Cube", "my.ops", 1, [x, w], attributes={"a": [1.0, 2.0]})[0]

    with caplog.at_level(logging.WARNING, logger="poptorch"):
        out, executor = run(poptorch, call)
    assert torch.equal(out, torch.zeros(2, 6))
    assert executor.program.custom_ops == ["my.ops.Cube"]
    assert "custom_op my.ops.Cube is not computed, its outputs are zeros" in caplog.text


@pytest.mark.parametrize("attributes", [{"a": [1, 2.0]}, {"a": None}, {"a": []}, {"a": {}}])
def test_custom_op_attribute_values(poptorch, attributes) -> None:
    with pytest.raises(ValueError, match="must be a float, int, str or a list of one"):
        poptorch.custom_op([], "n", "d", 1, [torch.ones(1)], attributes=attributes)


@pytest.mark.parametrize("name", ["größe", 3])
def test_custom_op_attribute_names(poptorch, name) -> None:
    with pytest.raises(ValueError, match="must be ASCII text"):
        poptorch.custom_op([], "n", "d", 1, [torch.ones(1)], attributes={name: 1})


def test_loops_and_conditions(poptorch) -> None:
    def loop(x, w):
        (y,) = poptorch.for_loop(3, lambda v: v * 2, [x])
        (z,) = poptorch.cond(y.sum() > 0, lambda v: v, [y], lambda v: -v, [y])
        return poptorch.identity_loss(z @ w, "sum")

    out, _ = run(poptorch, loop)
    assert out.item() == 8 * 2 * 6 * 4
    model = Function(loop)
    with pytest.raises(poptorch.Error, match="for_loop is supported in inference models only"):
        poptorch.trainingModel(model)(torch.ones(2, 6))
    with pytest.raises(AssertionError, match="body must be callable"):
        poptorch.for_loop(1, 3, [])
    for args in ((1.0, len, []), (1, len, ())):
        with pytest.raises(AssertionError, match="Unexpected type"):
            poptorch.for_loop(*args)
    with pytest.raises(AssertionError, match=r"Unexpected type .*condition"):
        poptorch.cond(True, len, [], len, [])


def test_cond_in_training(poptorch) -> None:
    def branch(x, w):
        return poptorch.cond(x.sum() > 0, lambda v: v @ w, [x], lambda v: v @ w, [x])[0]

    with pytest.raises(poptorch.Error, match="cond is supported in inference models only"):
        poptorch.trainingModel(Function(branch))(torch.ones(2, 6))


def test_cpu_layers_stop_requiring_gradients(poptorch) -> None:
    layer = nn.Linear(6, 4)
    host = poptorch.CPU(layer, "host")
    assert not layer.weight.requires_grad
    out, _ = run(poptorch, lambda x, w: host(x) + w.sum())
    assert out.shape == (2, 4)
