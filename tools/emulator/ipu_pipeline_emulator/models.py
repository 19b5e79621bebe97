"""The doors to an executor: ``trainingModel``, ``inferenceModel`` and ``load``."""

from __future__ import annotations

from typing import Any, Callable

from torch import nn

from . import saving
from .errors import createPoptorchError
from .executor import PoplarExecutor
from .optim import SGD
from .optim_base import popart_type
from .options import Options
from .options_base import require_type


def trainingModel(
    model: nn.Module | PoplarExecutor, options: Options | None = None, optimizer: Any = None
) -> PoplarExecutor:
    """Wrap a model for training; without an optimizer it is SGD(lr=0.01).

    Raises:
        RuntimeError: The model is wrapped already.
    """
    user_model = model.model if isinstance(model, PoplarExecutor) else model
    require_type(user_model, nn.Module, "the model")
    if optimizer is None:
        optimizer = SGD(user_model.parameters(), lr=0.01)
    popart_type(optimizer)
    return PoplarExecutor(user_model, options, training=True, optimizer=optimizer)


def inferenceModel(
    model: nn.Module | PoplarExecutor, options: Options | None = None
) -> PoplarExecutor:
    """Wrap a model for inference.

    Raises:
        Error: The options accumulate gradients.
    """
    user_model = model.model if isinstance(model, PoplarExecutor) else model
    if isinstance(options, Options) and options.Training.gradient_accumulation != 1:
        raise createPoptorchError(
            "Gradient accumulation must be 1 for inference models, got "
            f"{options.Training.gradient_accumulation}"
        )
    return PoplarExecutor(user_model, options, training=False)


def load(filename: str, edit_opts_fn: Callable[[Options], None] | None = None) -> PoplarExecutor:
    """Load an executable that was saved with its model.

    Args:
        filename: File or folder that ``save`` wrote.
        edit_opts_fn: Changes the options before they are frozen.

    Raises:
        Error: The file holds no model, or it was written by another version.
    """
    content = saving.read(filename)
    if content["model"] is None:
        raise createPoptorchError(
            f"{filename} was saved with export_model=False: make the model, wrap it and call "
            "loadExecutable()"
        )
    options = content["options"]
    if edit_opts_fn is not None:
        edit_opts_fn(options)
    executor = PoplarExecutor(
        content["model"], options, training=content["training"], optimizer=content["optimizer"]
    )
    executor.loadExecutable(filename)
    return executor
