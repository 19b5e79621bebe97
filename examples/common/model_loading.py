"""Load a model in float32, ready to train; say in one line which of its weights are new."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plan_report import say

from ipu_pipeline.errors import PipelineError, first_line

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def has_no_weights(folder: Path) -> bool:
    """Whether a folder describes a model without holding its weights."""
    return folder.is_dir() and not any(list(folder.glob(pattern)) for pattern in _WEIGHTS)


@contextlib.contextmanager
def loading(name_or_path: str, remedy: str) -> Iterator[None]:
    """Turn what transformers raises about a missing or unfit model into one line.

    Raises:
        PipelineError: What is loaded inside is not here, or is of another kind.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # of transformers, tokenizers and safetensors, about damaged files
        said = first_line(error)[:300]
        if isinstance(error, pickle.UnpicklingError):  # torch says how to run a stranger's code
            said = "its pytorch_model.bin is damaged, or holds more than tensors"
        raise PipelineError(
            f"model {name_or_path!r} cannot be loaded ({said}); {remedy}"
        ) from error


def load_weights(auto_class: Any, source: str, name_or_path: str, **config: Any) -> Any:
    """Return a model in training mode; name the weights that its files do not hold.

    A folder without any gives new ones.

    Args:
        auto_class: A class of transformers with ``from_pretrained``.
        source: What it loads.
        name_or_path: What the user called it.
        **config: Changes to its configuration. Weights whose shape they change are new.
    """
    import torch
    from transformers import AutoConfig

    if has_no_weights(Path(source)):
        made = AutoConfig.from_pretrained(source, trust_remote_code=False, **config)
        model = getattr(auto_class, "from_config", auto_class)(made)
        say(f"{name_or_path}: new weights: {model.num_parameters():,} parameters")
        return model.train()
    with _quiet():  # its report of missing weights is said in one line below
        model, info = auto_class.from_pretrained(
            source,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(config),
            **config,
        )
    reshaped = (key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])
    if new := ", ".join(sorted({*info["missing_keys"], *reshaped})):
        say(f"{name_or_path}: new weights, to be trained: {new}")
    return model.train()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers log errors only."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
