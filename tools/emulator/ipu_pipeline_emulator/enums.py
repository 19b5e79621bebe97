"""The enumerations of the public API (names as documented; values are PopART's where known)."""

from __future__ import annotations

import enum


class OutputMode(enum.Enum):
    """Which micro-batches' outputs a call returns."""

    Final = 0
    EveryN = 1
    All = 2
    Sum = 3
    Default = 4


class ReductionType(enum.Enum):
    """How gradients of micro-batches and replicas are combined."""

    Sum = "sum"
    Mean = "mean"
    NoReduction = "none"


class MeanReductionStrategy(enum.Enum):
    """When the mean over micro-batches is taken."""

    Running = 0
    Post = 1
    PostAndLoss = 2


class ConnectionType(enum.Enum):
    """When a device is acquired."""

    Always = 0
    OnDemand = 1
    Never = 2


class SyncPattern(enum.Enum):
    """How IPUs synchronise with each other."""

    Full = 0
    SinglePipeline = 1
    ReplicaAndLadder = 2


class CommGroupType(enum.Enum):
    """How replicas form groups."""

    All = 0
    Consecutive = 1
    Orthogonal = 2
    NoGrouping = 3


class VariableRetrievalMode(enum.Enum):
    """Which replicas' values of a variable are read back."""

    OnePerGroup = 0
    AllReplicas = 2


class AutoStage(enum.Enum):
    """How a block gets a pipeline stage when none is given."""

    SameAsIpu = 0
    AutoIncrement = 1


class Liveness(enum.Enum):
    """When tensors of a phase leave the chip."""

    AlwaysLive = 0
    OffChipAfterFwd = 1
    OffChipAfterFwdNoOverlap = 2
    OffChipAfterEachPhase = 3


class MatMulSerializationMode(enum.Enum):
    """Which axis of a matrix product is cut into slices."""

    InputChannels = "input_channels"
    ReducingDim = "reducing_dim"
    OutputChannels = "output_channels"
    Disabled = "none"


class OverlapMode(enum.Enum):
    """When input or output copies overlap with compute."""

    NoOverlap = "no_overlap"
    OverlapAccumulationLoop = "overlap_accumulation_loop"
    OverlapDeviceIterationLoop = "overlap_device_iteration_loop"


class DataLoaderMode(enum.Enum):
    """Where batches are collated."""

    Sync = 0
    Async = 1
    AsyncRebatched = 2


class SharingStrategy(enum.Enum):
    """How the worker of an asynchronous loader shares tensors."""

    SharedMemory = "shared_memory"
    FileSystem = "file_system"
    Fork = "fork"
    ForkServer = "forkserver"
