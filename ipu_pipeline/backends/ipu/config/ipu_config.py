"""``IPUConfig``: every setting of a published ``ipu_config.json``, immutable and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_type_hints

from msgspec import Meta

from ipu_pipeline.errors import ConfigError
from ipu_pipeline.ir.codec import from_json, read_json, unknown_field
from ipu_pipeline.ir.files import write_text
from ipu_pipeline.ir.limits import LIMITS, count_of
from ipu_pipeline.planner.layers_per_ipu import WILDCARD, expand_layers

CONFIG_FILE_NAME = "ipu_config.json"
DEFAULT_MATMUL_PROPORTION = 0.2
# Read, kept and written back; the last release that published them ignores them, and so do we.
LEGACY_FIELDS = (
    "execute_encoder_on_cpu_for_generation",
    "profile_dir",
    "sharded_execution_for_inference",
    "use_popdist",
)
_TRAINING = "it is an argument of training, such as --learning_rate"
_MODEL = "it belongs into the model's configuration"
# Keys that early releases (0.1 to 0.5) kept without reading them, by where they have an effect.
FOREIGN_KEYS = {
    **dict.fromkeys(
        ("async_dataloader", "dataloader_workers", "dataset", "learning_rate", "loss_scaling",
         "lr_schedule", "lr_warmup", "mask_tokens", "optimizer", "weight_decay"),
        _TRAINING,
    ),
    **dict.fromkeys(("attention_probs_dropout_prob", "layer_norm_eps"), _MODEL),
    "random_seed": "write seed",
    "synthetic_data": "a bundle's run.py makes random rows where it is given no --data",
    "compile_only": "save_executable compiles for IPUs that are not here",
    "_name_or_path": "it only says where the file was from",
    "_commit_hash": "it only says where the file was from",
}  # fmt: skip


# What fields hold: kinds and ranges, for JSON data and for override text.
IPUs = Annotated[int, Meta(ge=1, le=LIMITS["num_stages"])]
Steps = Annotated[int, Meta(ge=1, le=LIMITS["num_microbatches"])]
Copies = Annotated[int, Meta(ge=1, le=LIMITS["replicas"])]
Seed = Annotated[int, Meta(ge=0, le=LIMITS["seed"])]
Factor = Annotated[int, Meta(ge=0, le=LIMITS["slices"])]
Share = Annotated[float, Meta(ge=0, le=1)]  # of an IPU's memory
Tiles = Annotated[int, Meta(ge=32, le=192, multiple_of=2)]
Layers = Annotated[
    tuple[Annotated[int, Meta(ge=WILDCARD, le=LIMITS["num_layers"])], ...],
    Meta(min_length=1, max_length=LIMITS["num_stages"]),
]
Splits = Annotated[tuple[Factor, ...], Meta(min_length=1)]
Shares = Share | Annotated[tuple[Share, ...], Meta(min_length=1)]
Replicas = Copies | Annotated[Mapping[str, Copies], Meta(min_length=1)]
OutputMode = Literal["all", "sum", "final", "default"]
ONE_IPU_OVERLAPS = (
    "PopTorch overlaps host input with compute on one IPU only, not in a pipeline; leave "
    "num_io_tiles out, or run on one IPU"
)
# A comma separates two settings unless it stands inside brackets.
_SEPARATOR = re.compile(r",(?![^\[]*\])")
_BOOLS = {**dict.fromkeys(("yes", "y"), "true"), **dict.fromkeys(("no", "n"), "false")}


@dataclass(frozen=True)
class IPUConfig:
    """Settings of an IPU pipeline. ``None`` means: derived from the other fields.

    Fields called ``inference_x`` are ``x`` for inference; the methods take ``inference=True``.

    Attributes:
        layers_per_ipu: Layers on each IPU; -1 takes an even share of what is left over.
        ipus_per_replica: IPUs of one pipeline; ``None``: as many as ``layers_per_ipu`` has.
        replication_factor: Copies of the pipeline, or copies by pod type with ``default``.
        gradient_accumulation_steps: Microbatches per optimizer step; :meth:`accumulation`.
        device_iterations: Optimizer steps the device runs before it returns to the host.
        matmul_proportion: Share of an IPU's memory for temporary data, one or one per IPU.
        embedding_serialization_factor: Slices of the embedding lookup; 0 and 1 are whole.
        serialized_embedding_splits_per_ipu: Slices of the embedding that each IPU holds.
        projection_serialization_factor: Slices of the output projection; 0 and 1 are whole.
        serialized_projection_splits_per_ipu: Slices of the projection that each IPU holds.
        optimizer_state_offchip: Keep optimizer state in the host-attached memory.
        replicated_tensor_sharding: Divide optimizer state between the replicas.
        recompute: Whether every stage but the last runs its forward pass again in its backward
            pass; ``None``: PopTorch's default, which does on more than one IPU.
        recompute_checkpoint_every_layer: Keep layer outputs only and compute the rest again.
        stage_starts: First block and IPU of every stage, where ``layers_per_ipu`` cannot say it
            (a field of this package: the published library reads ``layers_per_ipu``).
        num_io_tiles: Tiles of an IPU that only load the next inputs from the host while the others
            compute, an even number from 32 to 192; ``None``: none. One IPU only.
        enable_half_partials: Accumulate matrix products in float16.
        auto_loss_scaling: Let the device choose the loss scaling.
        decompose_grad_sum: PopART's ``decomposeGradSum``: partial gradients are added in a tree.
        output_mode: What a step returns: ``all``, ``sum``, ``final`` or ``default``.
        seed: Seed of the device's random numbers.
        executable_cache_dir: Folder for compiled programs; empty for none.
        explicit_ir_inference: PopART's explicit representation, for inference.
        parallelize_kwargs: Model-specific arguments of the published library.
        foreign: Settings of other things that early published files hold (``FOREIGN_KEYS``).
        optimum_version: Library version that wrote the file.
        transformers_version: transformers version that wrote the file.

    Raises:
        ConfigError: A value has the wrong type, is out of range, or contradicts another one.
    """

    layers_per_ipu: Layers = (WILDCARD,)
    inference_layers_per_ipu: Layers | None = None
    ipus_per_replica: IPUs | None = None
    inference_ipus_per_replica: IPUs | None = None
    replication_factor: Replicas = field(default=1, hash=False)
    inference_replication_factor: Replicas = field(default=1, hash=False)
    gradient_accumulation_steps: Steps | None = None
    device_iterations: Steps = 1
    inference_device_iterations: Steps = 1
    matmul_proportion: Shares = DEFAULT_MATMUL_PROPORTION
    inference_matmul_proportion: Shares | None = None
    embedding_serialization_factor: Factor | None = None
    inference_embedding_serialization_factor: Factor | None = None
    serialized_embedding_splits_per_ipu: Splits | None = None
    inference_serialized_embedding_splits_per_ipu: Splits | None = None
    projection_serialization_factor: Factor | None = None
    inference_projection_serialization_factor: Factor | None = None
    serialized_projection_splits_per_ipu: Splits | None = None
    inference_serialized_projection_splits_per_ipu: Splits | None = None
    optimizer_state_offchip: bool = False
    replicated_tensor_sharding: bool = False
    recompute: bool | None = None
    recompute_checkpoint_every_layer: bool = False
    stage_starts: Mapping[str, int] | None = field(default=None, hash=False)
    num_io_tiles: Tiles | None = None
    enable_half_partials: bool = True
    auto_loss_scaling: bool = False
    explicit_ir_inference: bool = False
    output_mode: OutputMode = "final"
    seed: Seed | None = None
    executable_cache_dir: str = ""
    parallelize_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)
    inference_parallelize_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)
    optimum_version: str | None = None
    transformers_version: str | None = None
    decompose_grad_sum: bool | None = None
    enable_half_first_order_momentum: bool | None = None
    execute_encoder_on_cpu_for_generation: bool | None = None
    profile_dir: str | None = None
    sharded_execution_for_inference: bool | None = None
    use_popdist: bool | None = None
    foreign: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name, kind in field_types().items():
            value = from_json(kind, getattr(self, name), name, ConfigError)
            object.__setattr__(self, name, value)
        for inference in (False, True):
            prefix, num_ipus = "inference_" * inference, self.num_ipus(inference=inference)
            if self.num_io_tiles and num_ipus > 1:
                raise ConfigError(
                    f"num_io_tiles={self.num_io_tiles} with {num_ipus} IPUs "
                    f"({prefix}ipus_per_replica or {prefix}layers_per_ipu): {ONE_IPU_OVERLAPS}"
                )
            _check_consistency(self, prefix)

    # ---- reading and writing

    @classmethod
    def from_dict(cls, raw: Any, source: str = "the IPU configuration") -> IPUConfig:
        """Build a config from parsed JSON; messages start with ``source``.

        Raises:
            ConfigError: An unknown key, or a value that :class:`IPUConfig` refuses.
        """
        if isinstance(raw, Mapping):
            foreign = {name: raw[name] for name in raw if name in FOREIGN_KEYS}
            raw = {name: value for name, value in raw.items() if name not in foreign}
            if "foreign" in raw:  # keys of a file are its own, not in an object of ours
                raise ConfigError(f"{source}: {unknown_field(['foreign'], raw)}")
            raw |= {"foreign": foreign} if foreign else {}
        return from_json(cls, raw, source, ConfigError)

    @classmethod
    def load(cls, path: str | Path) -> IPUConfig:
        """Read ``ipu_config.json``, or the file of that name in a folder.

        Some published files hold a key twice: the last value counts, as for those who made them.

        Raises:
            ConfigError: Missing, not JSON, or wrong; the message starts with the path.
        """
        path = Path(path)
        path = path / CONFIG_FILE_NAME if path.is_dir() else path
        what = "the IPU configuration"
        raw = read_json(path, what, ConfigError, shown_texts=True, last_counts=True)
        return cls.from_dict(raw, str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data with every field that has a value, sorted by name."""
        found = {name: getattr(self, name) for name in field_types() if name != "foreign"}
        found |= self.foreign or {}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in sorted(found.items())
            if value is not None
        }

    def save(self, path: str | Path) -> Path:
        """Write ``ipu_config.json`` (into ``path`` if that is a folder) and return its path."""
        path = Path(path)
        path = path / CONFIG_FILE_NAME if path.is_dir() else path
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    def apply_overrides(self, text: str) -> IPUConfig:
        """Return a copy changed by ``a=1,b=[0.2 0.3],c=true``.

        Raises:
            ConfigError: The text is malformed, or the result would be inconsistent.
        """
        return replace(self, **_read_overrides(text))

    # ---- what the fields mean together

    def layers(self, *, inference: bool = False) -> tuple[int, ...]:
        """Return ``layers_per_ipu`` as written, wildcards included."""
        if inference and self.inference_layers_per_ipu is not None:
            return self.inference_layers_per_ipu
        return self.layers_per_ipu

    @property
    def leaves_layers_open(self) -> bool:
        """Whether it says nothing about the place of layers: the planner chooses."""
        return self.layers_per_ipu == (WILDCARD,) and not (
            self.stage_starts
            or self.serialized_embedding_splits_per_ipu
            or self.serialized_projection_splits_per_ipu
        )

    def num_ipus(self, *, inference: bool = False) -> int:
        """Return the IPUs of one replica."""
        training = self.ipus_per_replica or len(self.layers_per_ipu)
        if not inference:
            return training
        if self.inference_ipus_per_replica is not None:
            return self.inference_ipus_per_replica
        written = self.layers(inference=True)
        if training == len(self.layers_per_ipu) or written != (-1,):
            return len(written)
        return training

    def resolve_layers(self, num_layers: int, *, inference: bool = False) -> tuple[int, ...]:
        """Return the layers of each IPU for a model of ``num_layers``, wildcards filled in.

        Raises:
            ConfigError: The numbers do not fit the model.
        """
        name = "inference_layers_per_ipu" if inference else "layers_per_ipu"
        ipus = self.num_ipus(inference=inference)
        return expand_layers(self.layers(inference=inference), ipus, num_layers, name=name)

    def accumulation(self) -> int:
        """Return the microbatches per optimizer step; left open, those of a pipeline so long."""
        steps, num_ipus = self.gradient_accumulation_steps, self.num_ipus()
        if steps is None:
            return default_accumulation(num_ipus) if num_ipus > 1 else 1
        return steps

    def memory_proportions(self, *, inference: bool = False) -> tuple[float, ...]:
        """Return the temporary memory share of every IPU; one in a list is every IPU's."""
        value: float | tuple[float, ...] = self.matmul_proportion
        num_ipus = self.num_ipus(inference=inference)
        if inference and self.inference_matmul_proportion is not None:
            value = self.inference_matmul_proportion
        elif isinstance(value, tuple) and len(value) == 1:
            value = value[0]
        elif inference and isinstance(value, tuple) and len(value) != num_ipus:
            value = DEFAULT_MATMUL_PROPORTION
        return value if isinstance(value, tuple) else (value,) * num_ipus

    def replicas(self, *, inference: bool = False) -> int:
        """Return the copies of the pipeline; a map gives its ``default``.

        Raises:
            ConfigError: The map has no ``default``; :meth:`for_pod` chooses an entry.
        """
        name = "inference_replication_factor" if inference else "replication_factor"
        return _choose_replicas(name, getattr(self, name), None)

    def for_pod(self, pod_type: str | None) -> IPUConfig:
        """Return a copy whose replication factors are the numbers for ``pod_type``.

        Args:
            pod_type: Such as ``pod16``; ``None`` takes the map's ``default``.

        Raises:
            ConfigError: The map has no such entry, or the replicas need more IPUs than the pod
                has (``pod16`` has 16).
        """
        name = "replication_factor"
        training = _choose_replicas(name, self.replication_factor, pod_type)
        inference = _choose_replicas(
            f"inference_{name}", self.inference_replication_factor, pod_type
        )
        _check_pod_size(pod_type, training, self.num_ipus())
        return replace(self, replication_factor=training, inference_replication_factor=inference)

    def legacy_notes(self) -> tuple[str, ...]:
        """Return one line for every field that is set but has no effect any more."""
        kept = "has no effect; it is kept for the file only"
        legacy = ((name, getattr(self, name), kept) for name in LEGACY_FIELDS)
        generation = (
            (name, getattr(self, name), "has no effect here: its arguments are of generation")
            for name in ("parallelize_kwargs", "inference_parallelize_kwargs")
        )
        foreign = (
            (name, value, f"has no effect here: {FOREIGN_KEYS[name]}")
            for name, value in (self.foreign or {}).items()
        )
        return tuple(
            f"{name}={value!r} {text}"
            for name, value, text in (*legacy, *generation, *foreign)
            if value
        )


@cache
def field_types() -> dict[str, Any]:
    """Return the types of the fields of :class:`IPUConfig`, with their ranges."""
    return get_type_hints(IPUConfig, include_extras=True)


def _read_overrides(text: str) -> dict[str, Any]:
    """Read ``name=value`` settings separated by commas.

    Lists are written ``[1 2 3]`` or ``[1,2,3]``, booleans ``true`` or ``false``, and ``none``
    puts an optional field back to its derived value.

    Raises:
        ConfigError: No ``=``, an unknown or repeated name, or a value of the wrong type.
    """
    found: dict[str, Any] = {}
    known = field_types()
    for part in filter(None, (part.strip() for part in _SEPARATOR.split(text))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise ConfigError(f"override {part!r} is not name=value; separate settings by commas")
        if name not in known:
            raise ConfigError(f"override {part}: {unknown_field([name], known)}")
        if name in found:
            raise ConfigError(f"override {name} is given twice: {found[name]!r} and {value!r}")
        kind = known[name]
        place = f"override {name}={value}"
        found[name] = from_json(kind, _from_text(value, kind), place, ConfigError, strict=False)
    return found


def _from_text(text: str, kind: Any) -> Any:
    """Return what a value is read from: a list, nothing, or the text of a number or word."""
    if text.startswith("[") and text.endswith("]"):
        return text[1:-1].replace(",", " ").split()
    if NoneType in get_args(kind) and text.lower() in ("none", "null"):
        return None
    return _BOOLS.get(text.lower(), text) if kind in (bool, bool | None) else text


def default_accumulation(num_stages: int) -> int:
    """Return eight microbatches, or as many as PopART needs to train so many stages."""
    return max(8, 2 * num_stages - 1)


def _check_consistency(config: IPUConfig, prefix: str) -> None:
    """Refuse fields that contradict each other, once for training, once for inference."""
    inference = bool(prefix)
    lengths: dict[str, Any] = {}
    if config.layers(inference=inference) != (-1,):
        lengths[f"{prefix}layers_per_ipu"] = config.layers(inference=inference)
    proportion = getattr(config, f"{prefix}matmul_proportion")
    if isinstance(proportion, tuple) and (len(proportion) > 1 or inference):
        lengths[f"{prefix}matmul_proportion"] = proportion
    for layer in ("embedding", "projection"):
        factor_name = f"{prefix}{layer}_serialization_factor"
        splits_name = f"{prefix}serialized_{layer}_splits_per_ipu"
        factor, splits = getattr(config, factor_name), getattr(config, splits_name)
        if splits is None:
            continue
        lengths[splits_name] = splits
        shown = f"{splits_name}={list(splits)}"
        if factor:
            raise ConfigError(
                f"{factor_name}={factor} and {shown} exclude each other; the first serializes on "
                "one IPU, the second spreads over IPUs: keep one"
            )
        used = [position for position, count in enumerate(splits) if count]
        if not used:
            raise ConfigError(f"{shown} has no split; give at least one IPU one")
        if used[-1] - used[0] + 1 != len(used):
            raise ConfigError(
                f"{shown} leaves a gap; splits must be on IPUs that follow each other"
            )
    num_ipus = config.num_ipus(inference=inference)
    for name, values in lengths.items():
        if len(values) != num_ipus:
            raise ConfigError(
                f"{name}={list(values)} has {len(values)} entries, but a replica has {num_ipus} "
                f"IPUs ({prefix}ipus_per_replica or the length of {prefix}layers_per_ipu); make "
                "them equal"
            )


def _choose_replicas(name: str, value: int | Mapping[str, int], pod_type: str | None) -> int:
    if isinstance(value, int):
        return value
    for key in (pod_type, "default"):
        if key is not None and key in value:
            return value[key]
    raise ConfigError(
        f"{name} has no entry for {pod_type or 'default'!r}; it has {', '.join(value)}; choose one "
        f"of these as the pod type, or override {name}=1"
    )


def _check_pod_size(pod_type: str | None, replicas: int, num_ipus: int) -> None:
    match = re.fullmatch("pod([0-9]+)", pod_type or "")
    if pod_type is not None and match is None:
        raise ConfigError(f"pod type {pod_type!r} is unknown; write pod4, pod8, pod16, pod64, ...")
    if match is not None and replicas * num_ipus > int(match[1]):
        raise ConfigError(
            f"{pod_type} has {match[1]} IPUs, {count_of(replicas, 'replica')} of "
            f"{count_of(num_ipus, 'IPU')} need {replicas * num_ipus}; lower replication_factor "
            "or choose a larger pod"
        )
