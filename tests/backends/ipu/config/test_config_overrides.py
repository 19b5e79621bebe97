from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.config.ipu_config import Layers, Shares, Steps, field_types
from ipu_pipeline.errors import ConfigError


def test_every_kind_of_value() -> None:
    config = IPUConfig().apply_overrides(
        "gradient_accumulation_steps=16, matmul_proportion=[0.08 0.2],layers_per_ipu=[1,-1],"
        "auto_loss_scaling=true,enable_half_partials=False,output_mode=all,"
        "replication_factor=4,seed=none,inference_matmul_proportion=0.5,recompute=yes,"
        "optimizer_state_offchip=1,executable_cache_dir=n"
    )
    assert config.gradient_accumulation_steps == 16
    assert config.matmul_proportion == (0.08, 0.2)
    assert config.layers_per_ipu == (1, -1)
    assert config.auto_loss_scaling
    assert not config.enable_half_partials
    assert config.output_mode == "all"
    assert config.replication_factor == 4
    assert config.seed is None
    assert config.inference_matmul_proportion == 0.5
    assert config.recompute
    assert config.optimizer_state_offchip
    assert config.executable_cache_dir == "n"


def test_the_published_command_line() -> None:
    from ipu_pipeline.backends.ipu.config import load_preset

    config = load_preset("Graphcore/bert-base-ipu").apply_overrides(
        "embedding_serialization_factor=2"
    )
    assert config.embedding_serialization_factor == 2
    assert config.for_pod("pod16").replication_factor == 4


@pytest.mark.parametrize("text", ["", "  ", ","])
def test_nothing_to_change(text: str) -> None:
    assert IPUConfig().apply_overrides(text) == IPUConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed", "override 'seed' is not name=value"),
        ("=3", "override '=3' is not name=value"),
        ("sead=3", "override sead=3: unknown field 'sead'; did you mean seed"),
        ("seed=3,seed=4", "override seed is given twice: 3 and '4'"),
        ("seed=three", r"override seed=three: Expected `int \| null`, got `str`"),
        ("auto_loss_scaling=maybe", "override auto_loss_scaling=maybe: Expected `bool`"),
        ("layers_per_ipu=1 2", "override layers_per_ipu=1 2: Expected `array`, got `str`"),
        ("matmul_proportion=[a]", r"override matmul_proportion=\[a\]\[0\]: Expected `float`, got"),
        ("parallelize_kwargs=x", "override parallelize_kwargs=x: Expected `object"),
        ("device_iterations=none", "override device_iterations=none: Expected `int`, got `str`"),
        ("device_iterations=0", "override device_iterations=0: Expected `int` >= 1"),
        (
            "ipus_per_replica=3,matmul_proportion=[0.1 0.2]",
            "has 2 entries, but a replica has 3 IPUs",
        ),
    ],
)
def test_wrong_overrides_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IPUConfig().apply_overrides(text)


_VALUES = {
    bool: st.booleans(),
    Steps: st.integers(1, 9),
    Layers: st.lists(st.integers(0, 9), min_size=2, max_size=2),
    Shares: st.floats(0, 1, allow_nan=False),
}


@given(st.data())
def test_what_is_written_is_what_is_read(data) -> None:
    known = field_types()
    plain = [name for name, kind in known.items() if kind in _VALUES]
    chosen = data.draw(st.lists(st.sampled_from(plain), unique=True))
    values = {name: data.draw(_VALUES[known[name]]) for name in chosen}
    config = IPUConfig().apply_overrides(",".join(f"{k}={_text(v)}" for k, v in values.items()))
    assert {name: config.to_dict()[name] for name in chosen} == values


def _text(value: object) -> str:
    if isinstance(value, list):
        return f"[{' '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_as_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        IPUConfig().apply_overrides(text)
