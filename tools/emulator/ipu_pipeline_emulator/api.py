"""Exactly the names that ``import poptorch`` offers when the stand-in is installed."""

from __future__ import annotations

import logging
from typing import Any

from . import enums, optim, options
from .blocks import BeginBlock, Block, BlockFunction, removeBlocks
from .dataloader import AsynchronousDataAccessor, DataLoader
from .enums import (
    AutoStage,
    CommGroupType,
    ConnectionType,
    DataLoaderMode,
    Liveness,
    MatMulSerializationMode,
    MeanReductionStrategy,
    OutputMode,
    OverlapMode,
    ReductionType,
    SharingStrategy,
    SyncPattern,
    VariableRetrievalMode,
)
from .errors import ConfigFileError, Error, RecoverableError, UnrecoverableError
from .executor import PoplarExecutor
from .models import inferenceModel, load, trainingModel
from .ops import (
    CPU,
    Attribute,
    MultiConv,
    NameScope,
    cond,
    custom_op,
    dynamic_slice,
    dynamic_update,
    for_loop,
    identity_loss,
    ipu_print_tensor,
    nop,
    recomputationCheckpoint,
    serializedMatMul,
    set_available_memory,
    set_overlap_for_input,
    set_overlap_for_output,
)
from .options import Options
from .stages import (
    ParallelPhasedExecution,
    Phase,
    PipelinedExecution,
    SerialPhasedExecution,
    ShardedExecution,
    Stage,
)
from .structure import ICustomArgParser, registerCustomArgParser
from .tensor_locations import TensorLocationSettings
from .tracing import is_running as isRunningOnIpu
from .version import __version__

_LEVELS = {
    "TRACE": logging.DEBUG,
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARN": logging.WARNING,
    "ERR": logging.ERROR,
    "OFF": logging.CRITICAL,
}


def setLogLevel(level: str) -> None:
    """Set the level of the ``poptorch`` logger.

    Raises:
        ValueError: Not TRACE, DEBUG, INFO, WARN, ERR or OFF.
    """
    if level not in _LEVELS:
        raise ValueError(f"log level must be one of {sorted(_LEVELS)}, got {level!r}")
    logging.getLogger("poptorch").setLevel(_LEVELS[level])


def ipuHardwareIsAvailable(_num_ipus: int = 1) -> bool:
    """Tell whether IPUs are there: never, with the stand-in."""
    return False


def ipuHardwareVersion(_num_ipus: int = 1) -> int:
    """Return the version of the IPUs that are there: 0, for none."""
    return 0


def public_names() -> dict[str, Any]:
    """Return the public names of the module with their values."""
    return {name: globals()[name] for name in __all__}


__all__ = [
    "CPU",
    "AsynchronousDataAccessor",
    "Attribute",
    "AutoStage",
    "BeginBlock",
    "Block",
    "BlockFunction",
    "CommGroupType",
    "ConfigFileError",
    "ConnectionType",
    "DataLoader",
    "DataLoaderMode",
    "Error",
    "ICustomArgParser",
    "Liveness",
    "MatMulSerializationMode",
    "MeanReductionStrategy",
    "MultiConv",
    "NameScope",
    "Options",
    "OutputMode",
    "OverlapMode",
    "ParallelPhasedExecution",
    "Phase",
    "PipelinedExecution",
    "PoplarExecutor",
    "RecoverableError",
    "ReductionType",
    "SerialPhasedExecution",
    "ShardedExecution",
    "SharingStrategy",
    "Stage",
    "SyncPattern",
    "TensorLocationSettings",
    "UnrecoverableError",
    "VariableRetrievalMode",
    "__version__",
    "cond",
    "custom_op",
    "dynamic_slice",
    "dynamic_update",
    "enums",
    "for_loop",
    "identity_loss",
    "inferenceModel",
    "ipuHardwareIsAvailable",
    "ipuHardwareVersion",
    "ipu_print_tensor",
    "isRunningOnIpu",
    "load",
    "nop",
    "optim",
    "options",
    "recomputationCheckpoint",
    "registerCustomArgParser",
    "removeBlocks",
    "serializedMatMul",
    "setLogLevel",
    "set_available_memory",
    "set_overlap_for_input",
    "set_overlap_for_output",
    "trainingModel",
]
