"""Random numbers keyed by position, so that a resumed run draws what the first run drew."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*key: int) -> int:
    """Return a seed that depends on every number of ``key`` and nothing else.

    Args:
        *key: Numbers of 0 or more, such as ``(seed, epoch, step)``.

    Returns:
        A number in ``[0, 2**63)``; neighbouring keys give unrelated seeds.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def keyed_randomness(*key: int) -> Iterator[None]:
    """Seed torch (CPU), numpy and ``random`` by ``key`` inside; put their states back after.

    Data sets and collators draw from these three (masking, augmentation), so inside this
    context a batch is a function of its position alone.
    """
    seed = derived_seed(*key)
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002  (the global state that others draw from)
    with torch.random.fork_rng(devices=[]):
        try:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
