"""Pipeline-parallel compilation for Transformers models: capture, price, split, run.

The names below are the public door; importing this package does not import torch until one of
them is used.
"""

from __future__ import annotations

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipu_pipeline.backends.ipu.config import IPUConfig
    from ipu_pipeline.capture import CapturedModel, capture
    from ipu_pipeline.capture.from_config import on_meta
    from ipu_pipeline.compiler import compile, plan
    from ipu_pipeline.ir.machine import Machine
    from ipu_pipeline.ir.plan import Plan
    from ipu_pipeline.planner.search import Constraints
    from ipu_pipeline.stages.executable import EvalResult, Executable, ExecutionOptions, StepResult
    from ipu_pipeline.task_pipeline import pipeline

__version__ = "0.1.0"

_HOMES = {
    "CapturedModel": "ipu_pipeline.capture",
    "Constraints": "ipu_pipeline.planner.search",
    "EvalResult": "ipu_pipeline.stages.executable",
    "Executable": "ipu_pipeline.stages.executable",
    "ExecutionOptions": "ipu_pipeline.stages.executable",
    "IPUConfig": "ipu_pipeline.backends.ipu.config",
    "Machine": "ipu_pipeline.ir.machine",
    "Plan": "ipu_pipeline.ir.plan",
    "StepResult": "ipu_pipeline.stages.executable",
    "capture": "ipu_pipeline.capture",
    "compile": "ipu_pipeline.compiler",
    "on_meta": "ipu_pipeline.capture.from_config",
    "pipeline": "ipu_pipeline.task_pipeline",
    "plan": "ipu_pipeline.compiler",
}

__all__ = [
    "CapturedModel",
    "Constraints",
    "EvalResult",
    "Executable",
    "ExecutionOptions",
    "IPUConfig",
    "Machine",
    "Plan",
    "StepResult",
    "capture",
    "compile",
    "on_meta",
    "pipeline",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    numbers = random.getstate()  # some libraries draw while they are imported
    try:
        return getattr(import_module(_HOMES[name]), name)
    finally:
        random.setstate(numbers)
