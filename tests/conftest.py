"""Settings that every test runs under, and the golden-file fixture."""

from __future__ import annotations

import gc
import logging
import os
import signal

# Before transformers, datasets and torch are imported by any test module.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.backends.cluster.processes import Processes

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden/ from the current output instead of comparing",
    )


def pytest_configure() -> None:
    # A slow machine must not fail an example for its time.
    # The same examples every time: what fails once fails again.
    settings.register_profile("tests", deadline=None, database=None, derandomize=True)
    settings.load_profile("tests")
    gc.set_threshold(200_000, 20, 100)  # as the command line does
    # Two workers share two cores; threads of their own would only fight.
    import torch

    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    # What was imported stays; collections do not look through it again and again.
    gc.collect()
    gc.freeze()


def _shared() -> dict[str, object]:
    """Return what all tests of a process share; a test that changes it changes later ones."""
    import torch
    import torch.nn.init

    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {
        # transformers puts functions of its own there while it builds a model.
        "torch.nn.init": tuple(map(id, vars(torch.nn.init).values())),
        "torch.linspace": id(torch.linspace),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the working directory": Path.cwd(),
        "the environment of a rank": tuple(map(os.environ.get, ranks)),
        "PYTHONPATH": os.environ.get("PYTHONPATH"),
        "handlers of signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "logging.disable()": logging.root.manager.disable,
    }


@pytest.fixture(autouse=True)
def _nothing_is_left_changed() -> Iterator[None]:
    """A test that leaves something changed for all fails itself, not one that comes later."""
    before = _shared()
    yield
    after = _shared()
    changed = [name for name, value in before.items() if after[name] != value]
    assert not changed, f"left changed: {', '.join(changed)}"


@pytest.fixture(scope="session")
def root() -> Path:
    """Top folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def two() -> Iterator[Processes]:
    """Two processes: gloo, one thread each; started once, and again after a failure."""
    yield from _processes(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Processes]:
    """Four of them."""
    yield from _processes(4)


def _processes(number: int) -> Iterator[Processes]:
    from tests.backends.cluster.processes import Processes

    processes = Processes(number)
    yield processes
    processes.close()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with a file of tests/golden/, or write it under --update-golden."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing; run pytest --update-golden"
        expected = path.read_text(encoding="utf-8")
        assert text == expected, f"{name} changed; if that is intended, run pytest --update-golden"

    return check
