"""The sub-groups ``options.Precision``, ``.Training``, ``.Distributed`` and ``._Popart``."""

from __future__ import annotations

import os
from typing import Any

import torch

from .enums import MeanReductionStrategy, ReductionType
from .options_base import OptionsDict, require_type, setter


class PrecisionOptions(OptionsDict):
    """Number formats on the device."""

    def __init__(self, popart: PopartOptions) -> None:
        super().__init__(
            enableFloatingPointChecks=False, enableStochasticRounding=False, partialsType=None
        )
        object.__setattr__(self, "_popart", popart)

    def enableFloatingPointExceptions(self, enabled: bool) -> PrecisionOptions:
        """Stop on NaN, overflow and invalid operations."""
        require_type(enabled, bool, "enableFloatingPointExceptions")
        self.set(enableFloatingPointChecks=enabled)
        return self

    def enableStochasticRounding(self, enabled: bool) -> PrecisionOptions:
        """Round to float16 at random, with the value as its mean."""
        require_type(enabled, bool, "enableStochasticRounding")
        self.set(enableStochasticRounding=enabled)
        return self

    def setPartialsType(self, dtype: torch.dtype) -> PrecisionOptions:
        """Choose the type of partial sums of matrix products and convolutions.

        Raises:
            ValueError: Neither float32 nor float16.
        """
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"partials type must be torch.float or torch.half, got {dtype}")
        self.set(partialsType=dtype)
        name = "float" if dtype == torch.float32 else "half"
        self._popart.set("partialsTypeMatMuls", name)
        self._popart.set("convolutionOptions", {"partialsType": name})
        return self

    def halfFloatCasting(self, _mode: Any) -> PrecisionOptions:
        """Do nothing: deprecated."""
        self.checkIsFrozen()
        return self

    def runningStatisticsAlwaysFloat(self, _value: bool) -> PrecisionOptions:
        """Do nothing: deprecated."""
        self.checkIsFrozen()
        return self

    def toDict(self) -> dict[str, Any]:
        """Return the keys of the back end; partials are in ``_Popart`` already."""
        values = super().toDict()
        del values["partialsType"]
        return values


class TrainingOptions(OptionsDict):
    """Accumulation and reduction of gradients."""

    def __init__(self, popart: PopartOptions) -> None:
        super().__init__(
            gradient_accumulation=1,
            accumulation_and_replication_reduction_type=ReductionType.Mean,
            meanAccumulationAndReplicationReductionStrategy=MeanReductionStrategy.Post,
            automaticLossScaling=False,
        )
        object.__setattr__(self, "_popart", popart)

    gradientAccumulation = setter(
        "gradient_accumulation", "Set micro-batches per weight update and replica."
    )

    def accumulationAndReplicationReductionType(self, kind: ReductionType) -> TrainingOptions:
        """Choose sum or mean of the gradients of micro-batches and replicas.

        Raises:
            ValueError: Another reduction.
        """
        require_type(kind, ReductionType, "accumulationAndReplicationReductionType")
        if kind not in (ReductionType.Mean, ReductionType.Sum):
            raise ValueError(f"Unsupported reduction type {kind}; use Mean or Sum")
        self.set(accumulation_and_replication_reduction_type=kind)
        return self

    setMeanAccumulationAndReplicationReductionStrategy = setter(
        "meanAccumulationAndReplicationReductionStrategy",
        "Choose when the mean is taken: running or at the end.",
    )
    setAutomaticLossScaling = setter(
        "automaticLossScaling", "Let the device adapt the loss scaling."
    )

    def setConvolutionDithering(self, enabled: bool) -> TrainingOptions:
        """Spread convolutions over the tiles; replaces earlier convolution options."""
        require_type(enabled, bool, "setConvolutionDithering")
        self.checkIsFrozen()
        self._popart.set("convolutionOptions", {"enableConvDithering": str(enabled).lower()})
        return self

    def toDict(self) -> dict[str, Any]:
        """Return the keys of the back end."""
        values = super().toDict()
        values["automaticLossScalingSettings.enabled"] = values.pop("automaticLossScaling")
        return values


class DistributedOptions(OptionsDict):
    """Which of several host processes this one is."""

    def __init__(self) -> None:
        super().__init__(num_processes=1, process_id=0)
        self.setEnvVarNames("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")

    def configureProcessId(self, process_id: int, num_processes: int) -> DistributedOptions:
        """Set both numbers."""
        self.set(process_id=process_id, num_processes=num_processes)
        return self

    def setEnvVarNames(self, count_name: str, id_name: str) -> DistributedOptions:
        """Read both numbers from environment variables, where they exist."""
        self.set(
            num_processes=int(os.environ.get(count_name, "1")),
            process_id=int(os.environ.get(id_name, "0")),
        )
        return self

    def disable(self) -> DistributedOptions:
        """Be the only process."""
        self.set(num_processes=1, process_id=0)
        return self

    @property
    def processId(self) -> int:
        """Index of this process."""
        return int(self.process_id)

    @property
    def numProcesses(self) -> int:
        """Number of processes."""
        return int(self.num_processes)


class PopartOptions(OptionsDict):
    """Raw session options of PopART: any key is taken, as in the front end."""

    def __init__(self) -> None:
        super().__init__(options={}, patterns={}, patterns_level=2)

    def set(self, key: str, value: Any) -> PopartOptions:  # type: ignore[override]
        """Store one session option."""
        self.checkIsFrozen()
        self._values["options"][key] = value
        return self

    def setPatterns(self, patterns: dict[str, bool], level: int = 2) -> PopartOptions:
        """Switch PopART's patterns on or off; they reach training sessions only."""
        self.checkIsFrozen()
        require_type(patterns, dict, "setPatterns")
        require_type(level, int, "setPatterns' level")
        self._values["patterns"].update(patterns)
        self._values["patterns_level"] = level
        return self

    def setEngineOptions(self, options: dict[str, str]) -> PopartOptions:
        """Replace the engine options."""
        require_type(options, dict, "setEngineOptions")
        return self.set("engineOptions", dict(options))

    def toDict(self) -> dict[str, Any]:
        """Return the session options and the patterns."""
        values = dict(self._values["options"])
        if self._values["patterns"]:
            values["patterns"] = dict(self._values["patterns"])
            values["patterns_level"] = self._values["patterns_level"]
        return values
