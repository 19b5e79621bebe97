from __future__ import annotations

import pytest

from ipu_pipeline.backends.ipu.config import (
    IPUConfig,
    find_config,
    load_preset,
    preset_names,
    preset_source,
)
from ipu_pipeline.errors import ConfigError


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_names_its_source(name: str) -> None:
    config = load_preset(name)
    assert preset_source(name).startswith("https://huggingface.co/")
    assert IPUConfig.from_dict(config.to_dict()) == config
    assert config.for_pod("pod64").replicas() * config.num_ipus() <= 64


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("Graphcore/bert-base-ipu", (0, 4, 4, 4)),
        ("Graphcore/bert-large-ipu", (3, 7, 7, 7)),
        ("Graphcore/distilbert-base-ipu", (2, 4)),
        ("Graphcore/lxmert-base-ipu", (-1,)),
        ("Graphcore/gpt2-medium-wikitext-103", (0, 3, 3, 3, 3, 4, 4, 4)),
    ],
)
def test_published_layers(name: str, layers: tuple[int, ...]) -> None:
    assert load_preset(name).layers_per_ipu == layers


def test_published_replicas_on_a_pod16() -> None:
    names = {"Graphcore/bert-base-ipu": 4, "Graphcore/distilbert-base-ipu": 8}
    for name, replicas in names.items():
        assert load_preset(name).for_pod("pod16").replication_factor == replicas


def test_config_by_name_file_or_folder(tmp_path) -> None:
    config = load_preset("Graphcore/vit-base-ipu")
    path = config.save(tmp_path)
    assert find_config("Graphcore/vit-base-ipu") == config
    assert find_config(str(tmp_path)) == config
    assert find_config(str(path)) == config


def test_unknown_names_offer_close_ones() -> None:
    with pytest.raises(ConfigError, match=r"'Graphcore/bert-ipu' \(there is .*bert-base-ipu"):
        load_preset("Graphcore/bert-ipu")
    with pytest.raises(
        ConfigError, match=r"no file or folder 'zzz', and no packaged preset.*ipu_c"
    ):
        find_config("zzz")
    with pytest.raises(ConfigError, match=r"pass a local ipu_config\.json instead"):
        preset_source("zzz")
