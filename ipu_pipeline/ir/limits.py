"""The one table of limits: the largest of every count that a user can give.

Each is beyond any machine, model or run that exists, and small enough that whatever is refused is
refused at once, before something is made of it. Files have limits of their own where they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

LIMITS: Mapping[str, int] = {
    # ---- machines
    "num_devices": 65_536,
    "num_stages": 4_096,
    "replicas": 65_536,
    # Stages that one machine runs for one job, a thread or a process each; threads of each, and
    # how often they start again.
    "workers": 256,
    "threads": 4_096,
    "max_restarts": 10_000,
    "nodes": 65_536,
    "gpus_per_node": 1_024,
    # ---- a step
    "num_microbatches": 10**9,
    "device_iterations": 10**9,
    "steps": 10**9,
    "global_batch": 10**9,
    # Passes that are listed one by one, where no steady state repeats.
    "actions": 2**18,
    # ---- a microbatch that is made here
    "micro_batch": 65_536,
    "seq_length": 2**20,
    "elements": 2**27,
    # ---- a model
    "num_layers": 10_000,
    "num_labels": 10**6,
    "num_experts": 65_536,
    "slices": 65_536,
    "seed": 2**63 - 1,
    # numpy's, which transformers seeds as well.
    "training_seed": 2**32 - 1,
    # ---- a search
    "max_ideals": 10**7,
}


def check_count(
    name: str,
    value: object,
    limit: str = "",
    *,
    least: int = 1,
    error: type[Exception] = ValueError,
) -> None:
    """Refuse what is no whole number from ``least`` to the limit of its kind.

    Args:
        name: What the user calls it.
        value: What was given.
        limit: Which of :data:`LIMITS`; empty: ``name``.
        least: Smallest number.
        error: Raised with a message that says the range.
    """
    most = LIMITS[limit or name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise error(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise error(f"{name} must be at least {least}, got {value}")
    if value > most:
        shown = value if value < 10**19 else "more"
        raise error(f"{name} may be {most} at most, got {shown}")


def check_elements(*shape: int) -> None:
    """Refuse a tensor that is made here and has more elements than the limit.

    Raises:
        ValueError: It has.
    """
    if prod(shape) > LIMITS["elements"]:
        sizes = " x ".join(map(str, shape))
        raise ValueError(
            f"a batch of this size has a tensor of {sizes} elements, {LIMITS['elements']} are "
            "possible; lower the micro batch or the sequence length"
        )


def check_counts(owner: object, limits: Mapping[str, str]) -> None:
    """Check the attributes of ``owner`` that are given, by the names of their limits."""
    for name, limit in limits.items():
        value = getattr(owner, name)
        if value is not None:
            check_count(name, value, limit)


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 stage``, ``2 stages``, ``3 processes``."""
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number} {noun}{'' if number == 1 else ending}"
