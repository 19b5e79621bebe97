"""From a transformers config to a model and a matching batch: what planning by name starts from.

On ``torch.device("meta")`` nothing is allocated, so a 70B model is built in a second. On
``cpu`` the same call gives real weights and a small batch of seeded values in valid ranges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from textwrap import shorten
from traceback import walk_tb
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from ipu_pipeline.capture.example_batch import BatchSize, example_batch, pair_label
from ipu_pipeline.errors import CaptureError, PipelineError, shown
from ipu_pipeline.ir.codec import read_json
from ipu_pipeline.ir.files import named
from ipu_pipeline.ir.limits import check_count

# The transformers auto class that finds the model class of each task. The class that a config names
# decides its task, the last one that fits: pretraining is first, as it is another task's for most.
TASKS: Mapping[str, str] = {
    "pretraining": "AutoModelForPreTraining",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
    "visual-question-answering": "AutoModelForVisualQuestionAnswering",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "ctc": "AutoModelForCTC",
    "audio-classification": "AutoModelForAudioClassification",
}
# transformers files these visual models under plain question answering.
_VISUAL_QA_TYPES = ("lxmert",)
# Fields of a config that say how many parts transformers makes, some while it reads the config.
_COUNTS = re.compile(r"(layer|expert|label)s?$")


def from_config(
    config: PretrainedConfig | str | Path,
    task: str | None = None,
    *,
    batch_size: int = 1,
    seq_length: int = 128,
    device: str = "meta",
    seed: int = 0,
    padded: bool = True,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a model in training mode and a batch with labels for it.

    Args:
        config: A config, a hub name, a local folder, or the path of a ``config.json``.
        task: One of :data:`TASKS`; ``None``: that of the class which the config names.
        batch_size: Samples of the batch.
        seq_length: Tokens of a sequence (encoder and decoder). Images and spectrograms have the
            size that the config says.
        device: ``meta`` for shapes only, ``cpu`` for seeded values.
        seed: Seed of the weights and of the batch.
        padded: Whether texts come with a mask of padding; without one, attention of decoders is
            causal to its kernels, which leave half of it out.

    Returns:
        The model and the keyword arguments of its forward; ``model(**batch)`` has a ``loss``.

    Raises:
        CaptureError: No such config or task, or the model has no class for the task.
        ValueError: A size below 1, or longer than the model's positions.
    """
    resolved = config if isinstance(config, PretrainedConfig) else load_config(config)
    task = task or infer_task(resolved)
    try:
        model = build_model(resolved, task, device=device, seed=seed)
        size = BatchSize(batch_size, seq_length)
        batch = example_batch(model, task, size, device=device, seed=seed)
        if not padded and set(batch) == {"input_ids", "attention_mask", "labels"}:
            del batch["attention_mask"]
        return model, batch
    except ValueError as error:
        raise ValueError(f"{described(resolved)}: {error}") from error


def on_meta(config: PretrainedConfig | str | Path, task: str | None = None) -> nn.Module:
    """Build a model in training mode without values: ``compile`` gives each process its own.

    Args:
        config: A config, a hub name, a local folder, or the path of a ``config.json``.
        task: One of :data:`TASKS`; ``None``: that of the class which the config names.

    Raises:
        CaptureError: No such config or task, or the model has no class for the task.
    """
    resolved = config if isinstance(config, PretrainedConfig) else load_config(config)
    return build_model(resolved, task or infer_task(resolved))


@contextmanager
def config_named(config: str | Path) -> Iterator[None]:
    """Name the config where the model that was built from it cannot be captured.

    Raises:
        CaptureError: As capture does, or in place of what the model's own forward raised.
    """
    try:
        yield
    except CaptureError as error:
        if named(config) in str(error):
            raise
        raise type(error)(f"{named(config)}: {error}") from error
    except PipelineError:
        raise
    except Exception as error:
        called = {frame.f_code for frame, _ in walk_tb(error.__traceback__)}
        if nn.Module._call_impl.__code__ not in called:  # not the model's
            raise
        raise CaptureError(
            f"the model of {named(config)} fails in its forward ({type(error).__name__}: "
            f"{_reason(error)}); correct the config"
        ) from error


def load_config(name_or_path: str | Path) -> PretrainedConfig:
    """Read a config by hub name, from a local folder, or from a ``config.json``.

    Raises:
        CaptureError: There is none, transformers does not know its model type, or a field in it
            has a wrong type or is far out of range.
    """
    file = Path(name_or_path)
    with suppress(OSError, ValueError):
        file = file / "config.json" if file.is_dir() else file
        if file.exists():
            _check_counts(read_json(file, "the config", CaptureError), str(file))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(name_or_path),
            trust_remote_code=False,  # nor is the user asked to
        )
    except Exception as error:  # transformers checks fields in its own ways
        raise CaptureError(
            f"no transformers config at '{named(name_or_path)}' ({_reason(error)}); pass a local "
            "folder, the path of a config.json, or a hub name while online"
        ) from error
    classes = config.architectures or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CaptureError(f"{file}: architectures is {shown(classes)}; give names of classes")
    return config


def _check_counts(raw: Any, source: str) -> None:
    """Refuse so many layers, experts or classes that building them would not return."""
    if not isinstance(raw, dict):
        raise CaptureError(f"{source} holds a {type(raw).__name__}; a config.json is an object")
    for name, value in raw.items():
        if isinstance(value, dict):
            _check_counts(value, f"{source}, {shown(name)}")
        elif type(value) is int and value > 0 and (found := _COUNTS.search(str(name))):
            check_count(f"{source}: {name}", value, f"num_{found[1]}s", error=CaptureError)


def _reason(error: Exception) -> str:
    return shorten(" ".join(str(error).split()), 200, placeholder="...") or type(error).__name__


def build_model(
    config: PretrainedConfig, task: str, *, device: str = "meta", seed: int = 0
) -> nn.Module:
    """Build the model class of ``task`` in training mode; the global generator is untouched.

    Raises:
        CaptureError: Unknown task, or no model class for it.
    """
    build = model_builder(config, task)
    _check_counts(config.to_dict(), described(config))
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        try:
            return build(config).train()
        except Exception as error:  # a config may hold anything
            raise CaptureError(
                f"transformers cannot build the model of {described(config)} "
                f"({type(error).__name__}: {_reason(error)}); correct the config"
            ) from error


def described(config: PretrainedConfig) -> str:
    """Return where a config is from, or its type."""
    return named(config.name_or_path) if config.name_or_path else f"this {config.model_type} config"


def model_builder(config: PretrainedConfig, task: str) -> Callable[[PretrainedConfig], nn.Module]:
    """Return what builds the model of ``task`` from a config.

    Raises:
        CaptureError: Unknown task, or transformers has no class of this model for it.
    """
    if task not in TASKS:
        raise CaptureError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if not _class_names(config, task):
        possible = ", ".join(_possible_tasks(config)) or "none for any known task"
        raise CaptureError(
            f"transformers has no {config.model_type} model for {task}; it has {possible}"
        )
    build: Callable[[PretrainedConfig], nn.Module] = _auto_class(config, task).from_config
    return build


def infer_task(config: PretrainedConfig) -> str:
    """Return the task of the class that a published config names in ``architectures``.

    Raises:
        CaptureError: It names none, or one of no known task.
    """
    named = set(config.architectures or ())
    for task in reversed(_possible_tasks(config)):
        if named & _class_names(config, task):
            return task
    raise CaptureError(
        f"cannot tell the task of {described(config)} (it names "
        f"{shown(sorted(named)) if named else 'no architecture'}); {_remedy(config)}"
    )


def _remedy(config: PretrainedConfig) -> str:
    own = "plan it in Python with a batch of your own, ipu_pipeline.plan(model, batch)"
    possible = ", ".join(_possible_tasks(config))
    return f"say which: {possible}; or {own}" if possible else f"no task is known for it: {own}"


def _possible_tasks(config: PretrainedConfig) -> list[str]:
    return [
        task
        for task in TASKS
        if _classes(config, task)
        and (task != "pretraining" or any(map(pair_label, _classes(config, task))))
    ]


def _class_names(config: PretrainedConfig, task: str) -> set[str]:
    """Names of the model classes of ``task`` for this config; empty when there is none."""
    return {item.__name__ for item in _classes(config, task)}


def _classes(config: PretrainedConfig, task: str) -> tuple[type[nn.Module], ...]:
    mapping = _auto_class(config, task)._model_mapping
    found = mapping.get(type(config), ())
    return found if isinstance(found, tuple) else (found,)


def _auto_class(config: PretrainedConfig, task: str) -> Any:
    visual = task == "visual-question-answering" and config.model_type in _VISUAL_QA_TYPES
    return getattr(transformers, TASKS["question-answering" if visual else task])


# ---- a model in the dtype that its products run in, for prices --------------------------------


_HALVES = ("bfloat16", "float16")
# Products of layers in 8 or 4 bits stand between operations in 16.
_QUANTIZED = ("float8", "float4")


def dtype_for(model: nn.Module, precision: str | None) -> str:
    """Return the dtype to capture a model in for GPUs.

    That of ``precision``; of ``None``: that of the model's weights if they have 16 bits, else what
    its config says, else bfloat16, with the optimizer's copy of the weights in float32.
    """
    if precision:
        return "bfloat16" if precision in _QUANTIZED else precision
    own = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    halves = [name for name in _HALVES if name in own]
    if halves:
        return halves[0]
    stated = getattr(getattr(model, "config", None), "dtype", None)
    return "bfloat16" if stated is None else str(stated).removeprefix("torch.")


def in_dtype(
    model: nn.Module, batch: Mapping[str, Any], name: str
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return a copy of a model on the meta device, and its batch, with floats of a dtype.

    Both as they are, if the model has values on a device (it runs in its own dtype), or weights of
    that dtype already.
    """
    dtype = getattr(torch, name)
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if all(p.dtype == dtype for p in weights) or not all(p.is_meta for p in weights):
        return model, batch
    memo: dict[int, object] = {}
    for p in model.parameters():
        wanted = dtype if p.is_floating_point() else p.dtype
        empty = torch.empty_like(p, device="meta", dtype=wanted)
        memo[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
    floats = {
        key: value.to(dtype)
        for key, value in batch.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.is_meta
    }
    return deepcopy(model, memo), {**batch, **floats}
