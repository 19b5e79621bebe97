"""YAML from strangers: read as what JSON can hold, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import yaml  # type: ignore[import-untyped]

from ipu_pipeline.errors import shown
from ipu_pipeline.ir.codec import MAX_DEPTH, parse_json
from ipu_pipeline.ir.files import first_twice

MOST_VALUES = 100_000  # of a file, whose references repeat what is written once


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which no key stands twice in one place; it would take the last one silently."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Compose the node of a mapping whose keys differ."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        twice = first_twice(key.value for key, _ in node.value if isinstance(key.value, str))
        if twice is not None:
            raise ValueError(f"it has the key {shown(twice)} twice in one place; remove one")
        return node


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds, by the rules of :func:`~ipu_pipeline.ir.codec.parse_json`.

    Raises:
        ValueError: It is no YAML, holds what JSON does not have (dates, sets, NaN), or references
            that grow into more than a file can say.
    """
    try:
        found = yaml.load(text, _Loader)  # a SafeLoader
        left, count = [(found, 0)], 0
        while left:
            value, depth = left.pop()
            count += 1
            if count > MOST_VALUES or depth > MAX_DEPTH:
                raise ValueError(f"it has more than {MOST_VALUES} values or {MAX_DEPTH} levels")
            if isinstance(value, dict | list):
                inner = value.values() if isinstance(value, dict) else value
                left += [(item, depth + 1) for item in inner]
        return parse_json(json.dumps(found))
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as problem:
        said = " ".join(str(problem).split())[:300]
        raise ValueError(f"it is no YAML of plain values: {said}; correct it") from problem
