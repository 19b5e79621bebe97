"""Graphcore IPUs: what a split costs in seconds and bytes, and what a configuration will do."""

from ipu_pipeline.backends.ipu.prices.calibration import DEFAULT_CALIBRATION, Calibration
from ipu_pipeline.backends.ipu.prices.chip import Chip, chip_named, chip_of, is_ipu
from ipu_pipeline.backends.ipu.prices.memory import IPUMemory
from ipu_pipeline.backends.ipu.prices.model import IPUCostModel
from ipu_pipeline.backends.ipu.prices.predict import Prediction, predict, predict_on_chip
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.timing import StageTime, StepTime

__all__ = [
    "DEFAULT_CALIBRATION",
    "Calibration",
    "Chip",
    "IPUCostModel",
    "IPUMemory",
    "IPUSettings",
    "Prediction",
    "StageTime",
    "StepTime",
    "chip_named",
    "chip_of",
    "is_ipu",
    "predict",
    "predict_on_chip",
]
