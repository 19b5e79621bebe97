"""Rules between the fields of a configuration, checked once for training, once for inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ipu_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from ipu_pipeline.backends.ipu.config.ipu_config import IPUConfig


def check_consistency(config: IPUConfig, *, inference: bool) -> None:
    """Refuse fields that contradict each other.

    Raises:
        ConfigError: A list has another length than there are IPUs, or both ways to serialize a
            layer are used at once.
    """
    prefix = "inference_" if inference else ""
    num_ipus = config.num_ipus(inference=inference)
    layers = config.layers(inference=inference)
    if layers != (-1,):
        _check_length(f"{prefix}layers_per_ipu", layers, num_ipus, prefix)
    _check_proportions(config, num_ipus, prefix)
    for layer in ("embedding", "projection"):
        _check_serialization(config, layer, num_ipus, prefix)


def _check_proportions(config: IPUConfig, num_ipus: int, prefix: str) -> None:
    proportion = getattr(config, f"{prefix}matmul_proportion")
    if isinstance(proportion, tuple):
        _check_length(f"{prefix}matmul_proportion", proportion, num_ipus, prefix)


def _check_serialization(config: IPUConfig, layer: str, num_ipus: int, prefix: str) -> None:
    factor_name = f"{prefix}{layer}_serialization_factor"
    splits_name = f"{prefix}serialized_{layer}_splits_per_ipu"
    factor, splits = getattr(config, factor_name), getattr(config, splits_name)
    if splits is None:
        return
    if factor:
        raise ConfigError(
            f"{factor_name}={factor} and {splits_name}={list(splits)} exclude each other; the "
            "first serializes on one IPU, the second spreads over IPUs: keep one"
        )
    _check_length(splits_name, splits, num_ipus, prefix)
    used = [position for position, count in enumerate(splits) if count]
    if not used:
        raise ConfigError(f"{splits_name}={list(splits)} has no split; give at least one IPU one")
    if used[-1] - used[0] + 1 != len(used):
        raise ConfigError(
            f"{splits_name}={list(splits)} leaves a gap; splits must be on IPUs that follow each "
            "other"
        )


def _check_length(name: str, values: tuple[Any, ...], num_ipus: int, prefix: str) -> None:
    if len(values) != num_ipus:
        raise ConfigError(
            f"{name}={list(values)} has {len(values)} entries, but a replica has {num_ipus} IPUs "
            f"({prefix}ipus_per_replica or the length of {prefix}layers_per_ipu); make them equal"
        )
