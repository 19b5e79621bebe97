"""Gives a model on the meta device the tensors that this process needs, and no others.

A parameter is read from safetensors files, or initialised by the model's own code with random
numbers that depend on its name alone, so that every split starts from the same bits. One that is
not held here becomes a stand-in: the same shape over a few random numbers (a Hankel matrix), with
which the model can be captured and its losses can be looked at, as with any random weights.
"""

from __future__ import annotations

import copy
import ctypes
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from ipu_pipeline.checkpoint.slices import UNCUT, Slices
from ipu_pipeline.errors import LoweringError, shown
from ipu_pipeline.ir.codec import read_json
from ipu_pipeline.ir.files import named
from ipu_pipeline.stages.adapters import (
    adapter_initializers,
    has_adapters,
    name_in_base,
    without_adapters,
)

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# As of most initialisations: losses of a capture are those of an untrained model.
_STAND_IN_STD = 0.02
_ALIGNED = 16  # elements: at least 16 bytes, which kernels ask of a matrix's address
_SHOWN = 5
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def is_on_meta(model: nn.Module) -> bool:
    """Whether a model has parameters without values."""
    return any(parameter.is_meta for parameter in model.parameters())


def materialize(
    model: nn.Module,
    weights: str | Path | None = None,
    seed: int = 0,
    held: Collection[str] | None = None,
    slices: Slices = UNCUT,
) -> None:
    """Give a model on ``meta`` its tensors, in place: optimizers keep its parameters.

    Args:
        model: All of its parameters are on ``meta``; with one that has values nothing is done.
        weights: A folder with ``model.safetensors`` or its shards and their index, of which only
            what is held is read; ``None``: from scratch.
        seed: Of parameters that are initialised.
        held: Names of the parameters that this process needs, of tied ones any; ``None``: all.
        slices: What of each it needs. What is initialised is whole for a moment.

    Raises:
        LoweringError: ``weights`` are given for a model that has values, the files cannot be read
            or do not fit, or a tensor has neither a value in them nor code that initialises it.
    """
    if not is_on_meta(model):
        if weights is not None:
            raise LoweringError(
                f"weights={str(weights)!r} is for a model without values, and this one has some; "
                "leave it out, or build the model with ipu_pipeline.on_meta"
            )
        return
    names = _names_of(model)
    wanted = set(names) if held is None else {id_ for id_, own in names.items() if own & set(held)}
    kept = set().union(*(names[key] for key in wanted))
    read = {} if weights is None else _read_matching(weights, model, kept, slices)
    missing = _give_values(model, read, names, wanted, slices)
    if wanted != set(names):
        model.register_state_dict_pre_hook(_refuse_stand_ins)
    buffers = _materialize_buffers(model, read)
    _initialize(model, seed, missing, buffers)
    _cut(model, missing, slices)
    if weights is not None and missing:
        new = sorted(min(names[key]) for key in missing)
        logger.warning(
            "%d parameters are not in %s and are initialised: %s%s", len(new), weights,
            ", ".join(new[:_SHOWN]), ", ..." if len(new) > _SHOWN else "",
        )  # fmt: skip


def _read_matching(
    weights: str | Path, model: nn.Module, wanted: set[str], slices: Slices
) -> Mapping[str, Tensor]:
    """Read the parameters ``wanted``.

    Raises:
        LoweringError: The files are those of another model.
    """
    files = _Files(Path(weights), slices)
    read = _read(files, model, wanted, slices)
    if not files.matched:
        first = next(name for name, _ in model.named_parameters())
        raise LoweringError(
            f"none of the parameters of {type(model).__name__} ({first}, ...) is in "
            f"{weights}, which has {min(files.files, default='none')}, ...; give the weights "
            "of this model, or none to start from scratch"
        )
    return read


def _give_values(
    model: nn.Module,
    read: Mapping[str, Tensor],
    names: Mapping[int, set[str]],
    wanted: set[int],
    slices: Slices,
) -> set[int]:
    """Replace parameters in place: by stand-ins, by what was read, by memory without values.

    Returns those without values, by id.
    """
    missing: set[int] = set()
    for parameter in list(model.parameters()):
        key = id(parameter)
        value = next((read[name] for name in names[key] if name in read), None)
        if key not in wanted:
            value = stand_in(parameter)
        elif value is None:
            missing.add(key)
            value = torch.empty(slices.shape(parameter), dtype=parameter.dtype)
        else:
            value = slices.part(parameter, value)  # where files are read as a whole
        swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))
    return missing


def _refuse_stand_ins(model: nn.Module, _prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
    """Refuse to hand out stand-ins as weights: ``save_pretrained`` and ``torch.save`` ask so.

    Raises:
        LoweringError: The caller wants values (``keep_vars`` is for who looks at parameters).
    """
    if not keep_vars:
        raise LoweringError(
            f"this process has the weights of its own stages of {type(model).__name__} only, and "
            "stand-ins for the others; save_checkpoint(folder) of the executable writes the whole "
            "model, which from_pretrained(folder) reads, with adapters compile(weights=folder)"
        )


def _read(
    files: _Files, model: nn.Module, wanted: Collection[str], slices: Slices
) -> Mapping[str, Tensor]:
    """Read what is wanted, of a model with adapters by its own names or those in its base."""
    if not has_adapters(model):
        return files.tensors_of(model, wanted)
    if slices.size > 1:
        raise LoweringError(
            "adapters over a model on meta do not go with tensor parallelism; plan with tp 1, or "
            "build the model with values"
        )
    if any(name_in_base(name) != name for name in files.files):  # save_checkpoint's, with adapters
        return files.tensors_of(model, wanted)
    found = files.tensors_of(without_adapters(model), {name_in_base(name) for name in wanted})
    names = {n: name_in_base(n) for n in model.state_dict(keep_vars=True)}
    # A module that is trained beside the base begins as a copy of it.
    return {
        name: found[own].clone() if ".modules_to_save." in name else found[own]
        for name, own in names.items()
        if own in found
    }


def _cut(model: nn.Module, missing: Collection[int], slices: Slices) -> None:
    """Keep the slices of what was initialised as a whole."""
    for parameter in model.parameters():
        if id(parameter) in missing:
            parameter.data = slices.part(parameter, parameter.data)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Let the C library give the memory of freed tensors back to the system.

    Products copy stand-ins one after another, and what it keeps of them can be as much as a model.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # glibc's
    set_option(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, 1 << 25)  # what it has itself after large tensors


def _names_of(model: nn.Module) -> dict[int, set[str]]:
    """Return the names of every parameter by its id, of tied ones all."""
    found: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta:
            raise LoweringError(
                f"parameter {name!r} has values and others have none; build the whole model on "
                "meta (ipu_pipeline.on_meta), or none of it"
            )
        found.setdefault(id(parameter), set()).add(name)
    return found


def stand_in(parameter: Tensor) -> Tensor:
    """Return random numbers of the same shape that share memory: a matrix takes a row and a column.

    Of more dimensions the last two are as usual, as products of many matrices want them.
    """
    shape = parameter.shape
    if parameter.ndim < 2 or not parameter.dtype.is_floating_point:
        return torch.zeros(shape, dtype=parameter.dtype)
    steps = (1, 1) if len(shape) == 2 else (*[_ALIGNED] * (len(shape) - 2), shape[-1], 1)
    length = 1 + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
    generator = torch.Generator().manual_seed(parameter.numel())
    numbers = torch.randn(length, generator=generator) * _STAND_IN_STD
    return numbers.to(parameter.dtype).as_strided(shape, steps)


def _materialize_buffers(model: nn.Module, read: Mapping[str, Tensor]) -> set[int]:
    """Give buffers memory; return the ids of those without a value yet."""
    empty: set[int] = set()
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            value = read.get(f"{path}.{name}".lstrip("."))
            swap_tensors(buffer, torch.empty_like(buffer, device="cpu") if value is None else value)
            if value is None:
                empty.add(id(buffer))
    return empty


# ---- initialisation ------------------------------------------------------------------------------


def _initialize(
    model: nn.Module,
    seed: int,
    missing: Collection[int],
    buffers: Collection[int],
) -> None:
    """Run the model's own initialisation for what has no value yet.

    Raises:
        LoweringError: It leaves something without one.
    """
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    tensors = {id(tensor): (name, tensor) for name, tensor in named}
    left = tensors.keys() & {*missing, *buffers}
    if not left:
        return
    paths = {module: path for path, module in model.named_modules()}
    mode = _KeyedByName(seed, tensors, left)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), mode:
        adapters = adapter_initializers(model)
        for module, initialize in _initializers(model):
            mode.seed(paths[module])
            adapters.get(module, initialize)(module)
    untouched = sorted(tensors[key][0] for key in left - mode.written)
    if untouched:
        raise LoweringError(
            f"{type(model).__name__} has no code that gives {', '.join(untouched[:_SHOWN])} a "
            "value, and no file does; read it from a folder (weights=), or build the model with "
            "values"
        )


def _initializers(
    module: nn.Module, owner: PreTrainedModel | None = None
) -> Iterator[tuple[nn.Module, Callable[[nn.Module], object]]]:
    """Yield every module behind its parts, and what initialises its own tensors."""
    if isinstance(module, PreTrainedModel):
        owner = module
    for child in module.children():
        yield from _initializers(child, owner)
    reset = getattr(type(module), "reset_parameters", None)
    if owner is not None:
        yield module, owner._init_weights
    elif reset is not None:
        yield module, reset


class _KeyedByName(TorchFunctionMode):
    """Seeds torch by the name of the tensor that is filled; those with values are left alone.

    It is seeded again behind each of them: what is drawn next does not depend on which were filled.
    """

    def __init__(
        self, seed: int, tensors: Mapping[int, tuple[str, Tensor]], left: Collection[int]
    ) -> None:
        super().__init__()
        self._seed = seed
        filled = {key: own for key, own in tensors.items() if own[1].numel()}
        self._names = {t.untyped_storage().data_ptr(): name for name, t in filled.values()}
        self._left = {
            t.untyped_storage().data_ptr(): key for key, (_, t) in filled.items() if key in left
        }
        self.written = set(left) - filled.keys()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        word = getattr(func, "__name__", "")
        writes = (word.endswith("_") and not word.endswith("__")) or word == "__setitem__"
        written = args[0] if args else kwargs.get("tensor")  # as torch.nn.init hands it over
        if not writes or not isinstance(written, Tensor) or func is Tensor.requires_grad_:
            return func(*args, **kwargs)
        memory = written.untyped_storage().data_ptr()
        name = self._names.get(memory)
        if name is None:
            return func(*args, **kwargs)
        if memory in self._left:
            self.written.add(self._left[memory])
            self.seed(name)
            written = func(*args, **kwargs)
        self.seed(f"{name} was filled")
        return written

    def seed(self, name: str) -> None:
        """Seed torch by a name."""
        digest = blake2b(f"{self._seed} {name}".encode(), digest_size=7).digest()
        torch.manual_seed(int.from_bytes(digest, "big"))


# ---- files ---------------------------------------------------------------------------------------


class _Files:
    """The safetensors files of a folder, opened one by one where they are needed.

    ``slices`` says what of each tensor is needed.

    Attributes:
        folder: Where they are.
        files: Name of the file of every tensor.
        matched: Whether any of them is a tensor of the model, held here or not.
    """

    def __init__(self, folder: Path, slices: Slices) -> None:
        self.folder = folder
        self._of = slices
        self.matched = False
        index = folder / INDEX
        if index.is_file():
            content = read_json(index, "the index of the weights", LoweringError)
            where = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(where, dict) or not all(
                isinstance(file, str) and file and Path(file).name == file
                for file in where.values()
            ):
                raise LoweringError(
                    f"{index} has no weight_map of names of files beside it; save the model again"
                )
            self.files: dict[str, str] = where
        elif (folder / SINGLE).is_file():
            self.files = dict.fromkeys(self._names(SINGLE), SINGLE)
        else:
            raise LoweringError(
                f"there is neither {SINGLE} nor {INDEX} in {folder}; weights= takes a folder that "
                "save_pretrained or save_checkpoint has written"
            )

    def _names(self, file: str) -> list[str]:
        try:
            with safe_open(self.folder / file, framework="pt") as opened:
                return list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise self._unreadable(file, error) from error

    def _unreadable(self, file: str, error: Exception) -> LoweringError:
        by_index = "" if file == SINGLE else f", which {self.folder / INDEX} names,"
        return LoweringError(
            f"{named(self.folder / file)}{by_index} cannot be read ({shown(error)}); copy it again"
        )

    def _file_of(self, name: str) -> Path:
        """Return where a tensor is; the folder, if it goes by another name there."""
        return self.folder / self.files.get(name, "")

    def tensors_of(self, model: nn.Module, wanted: Collection[str]) -> dict[str, Tensor]:
        """Read what belongs to the parameters ``wanted`` and to buffers, by name in the model.

        Raises:
            LoweringError: A file cannot be read, or a tensor has another shape.
        """
        state = model.state_dict(keep_vars=True)
        needed = {n for n in state if n in wanted or not isinstance(state[n], nn.Parameter)}
        if isinstance(model, PreTrainedModel):
            found = self._converted(model, state, needed)
        else:
            self.matched = not state.keys().isdisjoint(self.files)
            with ExitStack() as opened:
                slices = self._slices(needed & self.files.keys(), opened)
                found = {name: part[:] if part.get_shape() else part[...]
                         for name, part in slices.items()}  # fmt: skip
        for name, tensor in found.items():
            if tensor.shape != self._of.shape(state[name]):
                raise LoweringError(
                    f"{name} is {tuple(tensor.shape)} in {self._file_of(name)} and "
                    f"{tuple(self._of.shape(state[name]))} in {type(model).__name__}; use the "
                    "weights of this model"
                )
        return {n: self._of.read(tensor).to(state[n].dtype) for n, tensor in found.items()}

    def _converted(
        self, model: PreTrainedModel, state: dict[str, Tensor], needed: set[str]
    ) -> dict[str, Tensor]:
        """Read as ``from_pretrained`` does, with its names and conversions."""
        mapping: list[Any] = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix = model.base_model_prefix

        def targets(source: str) -> set[str]:
            name, pattern = rename_source_key(source, renamings, converters, prefix, state)
            plain, _ = rename_source_key(source, [], [], prefix, state)
            several = [c.target_patterns for c in converters if pattern in c.source_patterns]
            parts = {name.replace(of[0], part) for of in several for part in of}
            return {source, plain, name, *parts}

        made = {source: targets(source) for source in self.files}
        self.matched = any(not state.keys().isdisjoint(names) for names in made.values())
        sources = {source for source, names in made.items() if needed & names}
        skeleton = copy.deepcopy(model)
        twins = dict(skeleton.named_modules())
        for name, parameter in model.named_parameters(remove_duplicate=False):
            path, _, own = name.rpartition(".")
            part = self._of.placeholder(parameter)
            if part is not parameter:
                twins[path]._parameters[own] = nn.Parameter(part)
        with ExitStack() as opened:
            convert_and_load_state_dict_in_model(
                skeleton,
                self._slices(sources, opened),
                LoadStateDictConfig(weight_mapping=mapping),
            )
        loaded = skeleton.state_dict(keep_vars=True)
        return {n: t.detach() for n, t in loaded.items() if n in needed and not t.is_meta}

    def _slices(self, names: Collection[str], opened: ExitStack) -> dict[str, Any]:
        """Return tensors that are read when they are used."""
        files: dict[str, Any] = {}
        found = {}
        for name in names:
            file = self.files[name]
            try:
                if file not in files:
                    files[file] = opened.enter_context(
                        safe_open(self.folder / file, framework="pt")
                    )
                found[name] = files[file].get_slice(name)
            except (OSError, SafetensorError) as error:
                raise self._unreadable(file, error) from error
        return found
