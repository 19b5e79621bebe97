"""Public names change on purpose only: they are pinned in tests/golden/public_names.txt."""

from __future__ import annotations

import importlib

import pytest

MODULES = ("ipu_pipeline", "ipu_pipeline.backends.ipu.config")


def public_names() -> str:
    """Return one line per public name, checking that each can be imported."""
    lines = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            assert hasattr(module, name), f"{module_name}.__all__ lists {name}, which is not there"
            lines.append(f"{module_name}.{name}")
    return "\n".join(lines) + "\n"


def test_public_names_are_pinned(golden) -> None:
    golden("public_names.txt", public_names())


def test_planted_name_is_caught(golden, monkeypatch, request) -> None:
    if request.config.getoption("--update-golden"):
        pytest.skip("would write the planted name")
    config = importlib.import_module("ipu_pipeline.backends.ipu.config")
    monkeypatch.setattr(config, "__all__", [*config.__all__, "expand"])
    with pytest.raises(AssertionError, match="lists expand, which is not there"):
        public_names()
    monkeypatch.setattr(config, "__all__", config.__all__[:-2])
    with pytest.raises(AssertionError, match=r"public_names\.txt changed"):
        golden("public_names.txt", public_names())
