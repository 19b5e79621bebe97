"""The stand-in takes poptorch's place, says so, and leaves nothing behind."""

from __future__ import annotations

import importlib
import logging
import sys
import types

import pytest

import ipu_pipeline_emulator as standin
from tests.tools.emulator.toys import mlp

PUBLIC = """
AsynchronousDataAccessor Attribute AutoStage BeginBlock Block BlockFunction CPU CommGroupType
ConfigFileError ConnectionType DataLoader DataLoaderMode Error ICustomArgParser Liveness
MatMulSerializationMode
MeanReductionStrategy MultiConv NameScope Options OutputMode OverlapMode ParallelPhasedExecution
Phase PipelinedExecution PoplarExecutor RecoverableError ReductionType SerialPhasedExecution
ShardedExecution SharingStrategy Stage SyncPattern TensorLocationSettings UnrecoverableError
VariableRetrievalMode __version__ cond custom_op dynamic_slice dynamic_update enums for_loop
identity_loss inferenceModel ipuHardwareIsAvailable ipuHardwareVersion ipu_print_tensor
isRunningOnIpu load nop optim options recomputationCheckpoint registerCustomArgParser
removeBlocks serializedMatMul
setLogLevel set_available_memory set_overlap_for_input set_overlap_for_output trainingModel
"""


def test_poptorch_is_importable_inside_only() -> None:
    with standin.install():
        import poptorch
        from poptorch import optim

        assert poptorch.optim is optim
        assert importlib.import_module("poptorch.options").Options is poptorch.Options
    assert not [name for name in sys.modules if name.split(".")[0] == "poptorch"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("poptorch")


def test_version_and_docstring_say_what_it_is(poptorch) -> None:
    assert poptorch.__version__ == "3.4.0+standin"
    assert "stand-in" in poptorch.__doc__
    assert standin.is_stand_in(poptorch)
    assert not poptorch.ipuHardwareIsAvailable()
    assert poptorch.ipuHardwareVersion() == 0


def test_public_names_are_pinned(poptorch) -> None:
    found = [name for name in vars(poptorch) if name == "__version__" or not name.startswith("_")]
    assert sorted(found) == sorted(PUBLIC.split())


def test_a_model_says_that_it_runs_on_the_stand_in(poptorch, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="poptorch"):
        poptorch.trainingModel(mlp())
    assert len(caplog.records) == 1
    assert "training model Mlp runs on the CPU" in caplog.text
    assert "stand-in 3.4.0+standin (no IPU, no Graphcore SDK)" in caplog.text


def test_log_level(poptorch) -> None:
    level = logging.getLogger("poptorch").level
    poptorch.setLogLevel("ERR")
    assert logging.getLogger("poptorch").level == logging.ERROR
    logging.getLogger("poptorch").setLevel(level)
    with pytest.raises(ValueError, match="log level must be one of"):
        poptorch.setLogLevel("LOUD")


@pytest.fixture
def real(monkeypatch) -> types.ModuleType:
    module = types.ModuleType("poptorch")
    module.__version__ = "3.4.0"
    monkeypatch.setitem(sys.modules, "poptorch", module)
    return module


def test_the_real_one_is_not_hidden(real) -> None:
    with pytest.raises(standin.StandInError, match="real poptorch can be imported here"):
        with standin.install():
            pass


def test_force_hides_the_real_one_and_puts_it_back(real) -> None:
    with standin.install(force=True) as module:
        assert sys.modules["poptorch"] is module
    assert sys.modules["poptorch"] is real


def test_nested_install_is_allowed(poptorch) -> None:
    with standin.install() as inner:
        assert sys.modules["poptorch"] is inner
    assert sys.modules["poptorch"] is poptorch
