"""Graphcore IPUs: what a pipeline costs in seconds and bytes, and which pipeline is the quickest.

Read the files in this order: ``chip.py``, ``matmul.py`` and ``operations.py`` (one operation,
one block), ``layout.py`` (stages of a configuration), ``timing.py`` and ``memory.py`` (THE price
of a pipeline), ``predict.py``; then the search's side: ``chain.py``, ``pipeline.py``,
``planning.py``.
"""

from ipu_pipeline.backends.ipu.prices.chip import (
    DEFAULT_CALIBRATION,
    Calibration,
    Chip,
    chip_named,
    chip_of,
    is_ipu,
)
from ipu_pipeline.backends.ipu.prices.memory import IPUMemory
from ipu_pipeline.backends.ipu.prices.planning import IPUPlanning, ProgramChoices
from ipu_pipeline.backends.ipu.prices.predict import Prediction, predict
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.timing import StageTime, StepTime

__all__ = [
    "DEFAULT_CALIBRATION",
    "Calibration",
    "Chip",
    "IPUMemory",
    "IPUPlanning",
    "IPUSettings",
    "Prediction",
    "ProgramChoices",
    "StageTime",
    "StepTime",
    "chip_named",
    "chip_of",
    "is_ipu",
    "predict",
]
