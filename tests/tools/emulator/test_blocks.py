"""Blocks and strategies: what is recorded, and what they refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.tools.emulator.toys import batch, mlp, two_ipus


def compiled(poptorch, model, *, strategy=None, accumulation=3):
    options = poptorch.Options()
    options.Training.gradientAccumulation(accumulation)
    if strategy is not None:
        options.setExecutionStrategy(strategy)
    executor = poptorch.trainingModel(model, options)
    executor.compile(*batch(2 * accumulation))
    return executor


def named(program):
    return [(b.id, b.stage, b.ipu) for b in program.blocks if b.id]


def test_program_has_blocks_in_order_with_their_variables(poptorch) -> None:
    program = compiled(poptorch, two_ipus(poptorch, mlp())).program
    assert named(program) == [("first", 0, 0), ("last", 1, 1)]
    assert program.blocks[1].parameters == ["first.weight", "first.bias"]
    assert program.blocks[2].parameters == ["last.weight", "last.bias"]
    assert program.blocks[2].losses == ["cross_entropy"]
    assert (program.ipu_changes, program.num_forward_stages, program.num_stages) == (1, 2, 3)
    assert program.stages_of_variables()["last.bias"] == [1]
    assert program.num_ipus == 2
    assert "last: stage 1, IPU 1" in program.describe()


def test_begin_block_twice_is_refused(poptorch) -> None:
    layer = poptorch.BeginBlock(nn.Linear(2, 2), "a", ipu_id=0)
    with pytest.raises(poptorch.Error, match="BeginBlock was called twice on the same module"):
        poptorch.BeginBlock(layer, "b", ipu_id=1)
    poptorch.removeBlocks(layer)
    poptorch.BeginBlock(layer, "b", ipu_id=1)


def test_error_has_type_message_and_location(poptorch) -> None:
    with pytest.raises(poptorch.Error) as caught:
        poptorch.BeginBlock(3)
    assert caught.value.type == "poptorch_py_error"
    assert caught.value.message == "BeginBlock needs a module or a callable, got int"
    assert caught.value.location == ""
    assert issubclass(poptorch.RecoverableError, poptorch.Error)
    assert poptorch.UnrecoverableError.type == "poptorch_cpp_error"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"user_id": 1.5}, "Unexpected type .* for user_id"),
        ({"ipu_id": -1}, "ipu_id must be an int of at least 0"),
        ({"ipu_id": "0"}, "ipu_id must be an int of at least 0"),
    ],
)
def test_ids_are_typed(poptorch, kwargs, message) -> None:
    for make in (
        lambda: poptorch.BeginBlock(nn.Linear(1, 1), **kwargs),
        lambda: poptorch.Block(**kwargs),
        lambda: poptorch.Block.start(**kwargs),
        lambda: poptorch.BlockFunction(**kwargs),
    ):
        with pytest.raises(AssertionError, match=message):
            make()


def test_remove_blocks_leaves_other_hooks(poptorch) -> None:
    model = mlp()
    calls = []
    model.first.register_forward_pre_hook(lambda _m, _i: calls.append(1))
    two_ipus(poptorch, model)
    poptorch.removeBlocks(model)
    compiled(poptorch, model, accumulation=1)
    assert calls
    assert len(model.first._forward_pre_hooks) == 1


def test_hooks_survive_copies_and_pickles(poptorch) -> None:
    model = two_ipus(poptorch, mlp())
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert named(compiled(poptorch, made).program) == [("first", 0, 0), ("last", 1, 1)]


def test_anonymous_blocks_keep_their_number(poptorch) -> None:
    model = mlp()
    poptorch.BeginBlock(model.last, ipu_id=0)
    poptorch.BeginBlock(model.first, ipu_id=0)
    executor = compiled(poptorch, model, accumulation=1)
    assert named(executor.program) == [("0", 0, 0), ("1", 0, 0)]
    executor.destroy()
    assert named(compiled(poptorch, model, accumulation=1).program) == [("0", 0, 0), ("1", 0, 0)]


def test_wrapped_functions_and_decorators_are_blocks(poptorch) -> None:
    @poptorch.BlockFunction("head", ipu_id=1)
    def head(layer, x):
        return layer(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 3), nn.Linear(3, 3)
            self.start = poptorch.BeginBlock(torch.relu, "relu", ipu_id=0)

        def forward(self, x, target):
            poptorch.Block.useAutoId()
            with poptorch.Block(ipu_id=0):
                x = self.first(x)
            x = head(self.last, self.start(x))
            poptorch.Block.start("loss", ipu_id=1)
            return nn.functional.cross_entropy(x, target)

    program = compiled(poptorch, Net()).program
    assert named(program) == [("0", 0, 0), ("relu", 0, 0), ("head", 1, 1), ("loss", 1, 1)]


def test_no_active_block_after_a_context(poptorch) -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 3)

        def forward(self, x, target):
            with poptorch.Block("a", ipu_id=0):
                x = self.first(x)
            return nn.functional.cross_entropy(x, target)

    with pytest.raises(poptorch.Error, match="No active Block, all the ops must belong to a Block"):
        compiled(poptorch, Net())


def test_on_the_cpu_blocks_do_nothing(poptorch) -> None:
    model = two_ipus(poptorch, mlp())
    x, _ = batch(2)
    with poptorch.Block("x", ipu_id=9):
        assert not poptorch.isRunningOnIpu()
        assert model(x).shape == (2, 3)


def test_auto_increment_numbers_from_one(poptorch) -> None:
    strategy = poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement)
    program = compiled(poptorch, two_ipus(poptorch, mlp()), strategy=strategy).program
    assert named(program) == [("first", 1, 0), ("last", 2, 1)]
    assert program.num_forward_stages == 2


def test_explicit_stages(poptorch) -> None:
    strategy = poptorch.PipelinedExecution(poptorch.Stage("first").ipu(0), ["last"])
    assert strategy.stage("last").blocks == ["last"]
    assert named(compiled(poptorch, two_ipus(poptorch, mlp()), strategy=strategy).program) == [
        ("first", 0, 0),
        ("last", 1, 1),
    ]


def test_stage_without_any_ipu_runs_on_the_ipu_of_its_number(poptorch) -> None:
    model = mlp()
    poptorch.BeginBlock(model.first, "first")
    poptorch.BeginBlock(model.last, "last")
    strategy = poptorch.PipelinedExecution("first", "last")
    assert named(compiled(poptorch, model, strategy=strategy).program)[1] == ("last", 1, 1)


def test_strategy_refusals(poptorch) -> None:
    pipelined = poptorch.PipelinedExecution
    with pytest.raises(AssertionError, match="Block 'a' is in two stages"):
        pipelined("a", ["b", "a"])
    with pytest.raises(AssertionError, match=r"Unexpected type .*a block id of Stage"):
        poptorch.Stage(1.5)
    with pytest.raises(AssertionError, match=r"Unexpected type .*Stage.ipu"):
        poptorch.Stage("a").ipu("0")
    with pytest.raises(AssertionError, match="a stage of an execution strategy"):
        pipelined(3.5)
    with pytest.raises(AssertionError, match="Nothing may follow an AutoStage"):
        pipelined(poptorch.AutoStage.SameAsIpu, "a")
    model = mlp()
    poptorch.BeginBlock(model.first, "first")
    with pytest.raises(AssertionError, match="Block 'first' has no ipu_id"):
        compiled(poptorch, model)


def test_phases(poptorch) -> None:
    phase = poptorch.Phase(poptorch.Stage("a"), poptorch.Stage("b")).ipus(0, 2)
    assert phase.stage(1).blocks == ["b"]
    with pytest.raises(AssertionError, match=r"Phase.ipus needs 2 IPUs, one for each stage, got 1"):
        phase.ipus(0)
    with pytest.raises(AssertionError, match="A Phase needs at least one stage"):
        poptorch.Phase()
    with pytest.raises(AssertionError, match="a stage of Phase"):
        poptorch.Phase(poptorch.Stage("a"), "b")
    with pytest.raises(AssertionError, match="a phase of an execution strategy"):
        poptorch.SerialPhasedExecution(3.5)
    serial = poptorch.SerialPhasedExecution("first", ["last"])
    serial.setTensorsLiveness(poptorch.Liveness.AlwaysLive).useSeparateBackwardPhase()
    assert serial.phase(1).stage(0).blocks == ["last"]
    with pytest.raises(AssertionError, match=r"Unexpected type .*setTensorsLiveness"):
        serial.setTensorsLiveness(0)
    with pytest.raises(AssertionError, match=r"Unexpected type .*useSeparateBackwardPhase"):
        serial.useSeparateBackwardPhase(1)
    program = compiled(poptorch, two_ipus(poptorch, mlp()), strategy=serial, accumulation=1).program
    assert named(program) == [("first", 0, 0), ("last", 1, 1)]


def test_serial_phases_are_on_ipu_0_by_default(poptorch) -> None:
    model = mlp()
    poptorch.BeginBlock(model.first, "first")
    poptorch.BeginBlock(model.last, "last")
    strategy = poptorch.SerialPhasedExecution("first", "last")
    program = compiled(poptorch, model, strategy=strategy, accumulation=1).program
    assert named(program) == [("first", 0, 0), ("last", 1, 0)]


def test_parallel_phases_alternate_ipus(poptorch) -> None:
    parallel = poptorch.ParallelPhasedExecution("first", "last").sendTensorsOffChipAfterFwd(True)
    with pytest.raises(AssertionError, match=r"Unexpected type .*sendTensorsOffChipAfterFwd"):
        parallel.sendTensorsOffChipAfterFwd(1)
    model = mlp()
    poptorch.BeginBlock(model.first, "first")
    poptorch.BeginBlock(model.last, "last")
    executor = compiled(poptorch, model, strategy=parallel, accumulation=1)
    assert named(executor.program) == [("first", 0, 0), ("last", 1, 1)]
    wrong = poptorch.ParallelPhasedExecution("last", "first")
    with pytest.raises(poptorch.Error, match="block 'first' of phase 1 is on IPU 0"):
        compiled(poptorch, two_ipus(poptorch, mlp()), strategy=wrong, accumulation=1)
