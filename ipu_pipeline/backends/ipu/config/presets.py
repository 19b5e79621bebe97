"""Published configurations by hub id, from a packaged file: no network is used.

``presets.json`` carries facts read from public configurations; every row names its source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ipu_pipeline.backends.ipu.config.ipu_config import CONFIG_FILE_NAME, IPUConfig
from ipu_pipeline.errors import ConfigError


def preset_names() -> tuple[str, ...]:
    """Return the hub ids of every packaged preset, sorted."""
    return tuple(sorted(_presets()))


def preset_source(name: str) -> str:
    """Return where the preset's facts were published.

    Raises:
        ConfigError: No preset has this name.
    """
    return str(_preset(name)["source"])


def load_preset(name: str) -> IPUConfig:
    """Return the published configuration of a hub id such as ``Graphcore/bert-base-ipu``.

    Raises:
        ConfigError: No preset has this name; the message offers close ones.
    """
    return IPUConfig.from_dict(_preset(name)["config"])


def find_config(name_or_path: str) -> IPUConfig:
    """Return the config of a preset name, a file, or a folder that holds ``ipu_config.json``.

    Raises:
        ConfigError: It is none of these, or the file is wrong.
    """
    if name_or_path in _presets():
        return load_preset(name_or_path)
    path = Path(name_or_path)
    if path.exists():
        return IPUConfig.load(path)
    raise ConfigError(
        f"no file or folder {name_or_path!r}, and {_unknown(name_or_path)}; pass a local "
        f"{CONFIG_FILE_NAME}, its folder, or a packaged name"
    )


def _preset(name: str) -> Mapping[str, Any]:
    if name not in _presets():
        raise ConfigError(f"{_unknown(name)}; pass a local {CONFIG_FILE_NAME} instead")
    return _presets()[name]


def _unknown(name: str) -> str:
    close = get_close_matches(name, _presets(), n=3, cutoff=0.5)
    offered = close or [*preset_names()]
    return f"no packaged preset is called {name!r} (there is {', '.join(offered)})"


@cache
def _presets() -> Mapping[str, Mapping[str, Any]]:
    text = (
        files("ipu_pipeline.backends.ipu.config")
        .joinpath("presets.json")
        .read_text(encoding="utf-8")
    )
    rows: Mapping[str, Mapping[str, Any]] = json.loads(text)["presets"]
    return rows
