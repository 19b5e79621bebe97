"""Where tensors live: ``options.TensorLocations`` and ``TensorLocationSettings``."""

from __future__ import annotations

import copy
from typing import Any

from .options_base import OptionsDict, require, require_type


class TensorLocationSettings(OptionsDict):
    """Location of one class of tensors."""

    def minElementsForOffChip(self, minimum: int) -> TensorLocationSettings:
        """Keep tensors with fewer elements on the chip."""
        require_type(minimum, int, "minElementsForOffChip")
        return self._put("minElementsForOffChip", minimum)

    def minElementsForReplicatedTensorSharding(self, minimum: int) -> TensorLocationSettings:
        """Do not shard tensors with fewer elements over replicas."""
        require_type(minimum, int, "minElementsForReplicatedTensorSharding")
        return self._put("minElementsForReplicatedTensorSharding", minimum)

    def useOnChipStorage(self, on_chip: bool | None = True) -> TensorLocationSettings:
        """Choose the chip's memory or streaming memory; ``None`` leaves it to PopART."""
        require(
            on_chip is None or isinstance(on_chip, bool),
            f"Unexpected type {type(on_chip)} for useOnChipStorage. Expected bool or None",
        )
        if on_chip is None:
            self.checkIsFrozen()
            self._values.pop("onChip", None)
            return self
        return self._put("onChip", int(on_chip))

    def useReplicatedTensorSharding(self, enabled: bool = True) -> TensorLocationSettings:
        """Split every tensor over the replicas."""
        require_type(enabled, bool, "useReplicatedTensorSharding")
        return self._put("useReplicatedTensorSharding", int(enabled))

    def useIOTilesToLoad(self, enabled: bool = True) -> TensorLocationSettings:
        """Load through the IO tiles."""
        require_type(enabled, bool, "useIOTilesToLoad")
        return self._put("useIOTilesToLoad", int(enabled))

    def useIOTilesToStore(self, enabled: bool = True) -> TensorLocationSettings:
        """Store through the IO tiles."""
        require_type(enabled, bool, "useIOTilesToStore")
        return self._put("useIOTilesToStore", int(enabled))

    def _put(self, key: str, value: int) -> TensorLocationSettings:
        self.checkIsFrozen()
        self._values[key] = value
        return self


class TensorLocationOptions(OptionsDict):
    """Locations of activations, weights, optimizer state and accumulators."""

    def numIOTiles(self, count: int) -> TensorLocationOptions:
        """Reserve tiles for input and output.

        Raises:
            AssertionError: Odd, or not in 32..192.
        """
        require_type(count, int, "numIOTiles")
        require(
            32 <= count <= 192 and count % 2 == 0,
            f"numIOTiles must be an even number between 32 and 192, got {count}",
        )
        self.checkIsFrozen()
        self._values["numIOTiles"] = count
        return self

    def setActivationLocation(self, location: TensorLocationSettings) -> TensorLocationOptions:
        """Set where activations live."""
        return self._locate("activation", location)

    def setWeightLocation(self, location: TensorLocationSettings) -> TensorLocationOptions:
        """Set where weights live."""
        return self._locate("weight", location)

    def setOptimizerLocation(self, location: TensorLocationSettings) -> TensorLocationOptions:
        """Set where the optimizer's state lives."""
        return self._locate("optimizer", location)

    def setAccumulatorLocation(self, location: TensorLocationSettings) -> TensorLocationOptions:
        """Set where gradient accumulators live."""
        return self._locate("accumulator", location)

    def _locate(self, what: str, location: Any) -> TensorLocationOptions:
        require_type(location, TensorLocationSettings, f"set{what.capitalize()}Location")
        self.checkIsFrozen()
        self._values[f"location_{what}"] = copy.deepcopy(location.toDict())
        return self
