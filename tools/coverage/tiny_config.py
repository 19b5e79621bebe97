"""A small config of any config class, from the names of its fields."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from tools.coverage.tiny_exceptions import EXCEPTIONS
from tools.coverage.tiny_rules import (
    FLAGS,
    HEADS,
    INTEGERS,
    LAYERS,
    LISTS,
    PART_LAYERS,
    TEXT_PARTS,
    TOKEN_IDS,
    WHERE_NONE,
    ZERO_FLOATS,
)

_TOKEN_ID = re.compile(
    r"(?P<name>.*?)_?token_(id|index)|(?P<mark>boi|eoi|boa|eoa|image|audio|video)_(?:token_)?index"
)
_INHERITED = frozenset(field.name for field in dataclasses.fields(PretrainedConfig))
_LAYER_COUNT = re.compile("num_hidden_layers|n_layers?|num_layers|depth")
_SECTIONS = "mrope_section"


def tiny_config(
    kind: type[PretrainedConfig],
    *,
    example: PretrainedConfig | None = None,
    part: bool = False,
    fixed: Mapping[str, Any] | None = None,
) -> Any:
    """Return a config of ``kind`` whose model trains in a fraction of a second.

    Nothing in it is random: every dropout probability is 0.

    Args:
        kind: Any config class of transformers.
        example: What to make smaller; else the class's defaults.
        part: It is a part of another config (a vision tower), and may have fewer layers.
        fixed: Values of fields.
    """
    own = {**EXCEPTIONS.get(kind.model_type, {}), **(fixed or {})}
    given = vars(example if example is not None else _default(kind, own))
    values: dict[str, Any] = {"use_cache": False}
    for field in dataclasses.fields(kind):
        if field.name in _INHERITED or not field.init:
            continue
        value = given.get(field.name)
        if value is None:
            value = WHERE_NONE.get(field.name)
        elif field.default is None and not isinstance(value, PretrainedConfig):
            continue  # the class computes it from other fields
        new = _tiny_value(given, field.name, value, part=part)
        if new is None and example is not None and value not in (None, field.default):
            new = value
        if new is not None:
            values[field.name] = new
    values.update(_outputs(given, values))
    values.update(_rotation(kind, given, values))
    values.update(own)
    return kind(**{name: value for name, value in values.items() if value is not Ellipsis})


def _default(kind: type[PretrainedConfig], own: Mapping[str, Any]) -> Any:
    try:
        return kind()
    except Exception:  # the defaults of a few classes contradict each other
        return kind(**{name: value for name, value in own.items() if value is not Ellipsis})


def _tiny_value(given: Mapping[str, Any], name: str, value: Any, *, part: bool) -> Any:
    """Return the small value of a field; ``None`` leaves it as it is."""
    if isinstance(value, PretrainedConfig):
        return tiny_config(
            type(value), example=value, part=part or not re.fullmatch(TEXT_PARTS, name)
        )
    if _TOKEN_ID.fullmatch(name):
        return _token_id(name) if isinstance(value, int | list | None) else None
    if isinstance(value, bool):
        return _first(FLAGS, name)
    if isinstance(value, float) and re.fullmatch(ZERO_FLOATS, name):
        return 0.0
    if isinstance(value, int):
        return _integer(given, name, value, part=part)
    if isinstance(value, list | tuple) and value:
        return _sequence(name, list(value))
    return None


def _integer(given: Mapping[str, Any], name: str, value: int, *, part: bool) -> int | None:
    found: int | None = _first(INTEGERS, name)
    if found is None or value <= 0:
        return None
    if found == LAYERS and _LAYER_COUNT.fullmatch(name) and part and not given.get("_out_indices"):
        found = PART_LAYERS
    if "key_value" in name or "kv" in name:  # not grouped where the example is not
        heads = given.get("num_attention_heads") or given.get("num_heads")
        found = HEADS if value == heads else found
    return min(found, value)


def _sequence(name: str, value: list[Any]) -> list[Any] | None:
    if name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        return _kinds_of_layers(value)
    if all(type(item) is float for item in value):
        return [0.0] * len(value) if re.fullmatch(ZERO_FLOATS, name) else None
    if not all(type(item) is int for item in value):
        return None
    small = _first(LISTS, name)
    if small is None:
        return None
    last = small[-1]
    padded = [*small, *[last] * len(value)] if len(small) > 1 else [last] * len(value)
    return [min(new, old) for new, old in zip(padded, value, strict=False)]


def _kinds_of_layers(kinds: list[str]) -> list[str]:
    """Keep every kind of layer that occurs, in order, in ``LAYERS`` layers."""
    distinct = list(dict.fromkeys(kinds))[:LAYERS]
    return sorted((distinct * LAYERS)[:LAYERS], key=distinct.index)


def _outputs(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Choose as many layers of a backbone of equal layers as before, the last ones."""
    chosen = given.get("_out_indices")
    if not chosen or "num_hidden_layers" not in values or len(chosen) > LAYERS:
        return {}
    depth = values["num_hidden_layers"]
    return {"out_indices": list(range(depth - len(chosen) + 1, depth + 1)), "out_features": None}


def _rotation(kind: Any, given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Divide the rotated pairs of a head among time, height and width."""
    rope = dict(given.get("rope_parameters") or {})
    if _SECTIONS not in rope and _SECTIONS not in (
        getattr(kind, "ignore_keys_at_rope_validation", None) or ()
    ):
        return {}
    head = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    pairs = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    if not rope:
        return {}  # the class makes it, layer by layer
    return {"rope_parameters": {**rope, _SECTIONS: [pairs - 2 * (pairs // 4), *[pairs // 4] * 2]}}


def _first(rules: tuple[tuple[str, Any], ...], name: str) -> Any:
    return next((value for pattern, value in rules if re.fullmatch(pattern, name)), None)


def _token_id(name: str) -> int | None:
    """Give special tokens ids of their own, the same in every part of a config."""
    match = _TOKEN_ID.fullmatch(name)
    assert match is not None
    return TOKEN_IDS.get(match["name"] or match["mark"] or "token")
