"""Configuration: ``ipu_config.json``, command line overrides and published presets. No torch."""

from ipu_pipeline.backends.ipu.config.ipu_config import CONFIG_FILE_NAME, IPUConfig
from ipu_pipeline.backends.ipu.config.presets import (
    find_config,
    load_preset,
    preset_names,
    preset_source,
)
from ipu_pipeline.planner.layers_per_ipu import expand_layers

__all__ = [
    "CONFIG_FILE_NAME",
    "IPUConfig",
    "expand_layers",
    "find_config",
    "load_preset",
    "preset_names",
    "preset_source",
]
