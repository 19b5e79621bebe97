"""``layers_per_ipu``: how many encoder or decoder layers each IPU holds, with ``-1`` wildcards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ipu_pipeline.errors import ConfigError

WILDCARD = -1


def expand_layers(
    layers_per_ipu: Sequence[int], num_ipus: int, num_layers: int, *, name: str = "layers_per_ipu"
) -> tuple[int, ...]:
    """Replace wildcards by numbers for a model of ``num_layers`` layers.

    A single ``[-1]`` stands for one wildcard on every IPU. Wildcards share the layers that the
    written numbers leave over, evenly; the last wildcard also takes the remainder. One IPU
    takes every layer, whatever the list says.

    Args:
        layers_per_ipu: Layers of each IPU, or -1.
        num_ipus: IPUs of one replica.
        num_layers: Layers of the model, encoder and decoder together.
        name: Field name for messages.

    Returns:
        One non-negative number per IPU; they add up to ``num_layers``.

    Raises:
        ConfigError: The numbers do not add up to the model's layers, or the lengths differ.

    Source:
        Documented behaviour of optimum-graphcore's ``layers_per_ipu`` (IPUConfig reference).
    """
    written = tuple(layers_per_ipu)
    if num_ipus == 1:
        return (num_layers,)
    if written == (WILDCARD,):
        written = written * num_ipus
    if len(written) != num_ipus:
        raise ConfigError(
            f"{name}={list(layers_per_ipu)} has {len(written)} entries for {num_ipus} IPUs; give "
            "one entry per IPU, or [-1] for an even split"
        )
    wildcards = [position for position, count in enumerate(written) if count == WILDCARD]
    left = num_layers - sum(count for count in written if count != WILDCARD)
    if left < 0 or (left > 0 and not wildcards):
        raise ConfigError(
            f"{name}={list(layers_per_ipu)} places {num_layers - left} layers, the model has "
            f"{num_layers}; change the numbers, or write -1 where layers may be added"
        )
    if not wildcards:
        return written
    share, remainder = divmod(left, len(wildcards))
    filled = [share if count == WILDCARD else count for count in written]
    filled[wildcards[-1]] += remainder
    return tuple(filled)


def counted_layers(
    layers: Mapping[str, bool], layers_per_ipu: Sequence[int], num_ipus: int
) -> tuple[str, ...]:
    """Return the layers that ``layers_per_ipu`` counts.

    Published lists for speech models count the transformer layers only; the convolutions in front
    of them (a feature extractor) then stay with what comes before the first layer.

    Args:
        layers: In execution order; whether each is a convolution, by name.
        layers_per_ipu: Layers of each IPU, or -1.
        num_ipus: IPUs of one replica.
    """
    names = list(layers)
    front = next((i for i, name in enumerate(names) if not layers[name]), len(names))
    written = WILDCARD not in layers_per_ipu and num_ipus > 1
    if written and sum(layers_per_ipu) == len(names) - front:
        return tuple(names[front:])
    return tuple(names)
