"""The order in which passes run, whatever the order in which they were written down."""

from __future__ import annotations

from collections.abc import Iterable

from ipu_pipeline.planner.passes.base import Pass

ORDER = (
    # Where a table is decides which stages hold it, so it comes before all that counts bytes.
    "serialize_embedding",
    # A projection may share its table with a lookup; it is cut once the lookup's slices are known.
    "serialize_projection",
    # Last: whoever looks at what a block keeps should see it serialized already. A head fused with
    # the loss keeps no logits, so there is less to recompute.
    "recompute",
)


def in_default_order(passes: Iterable[Pass]) -> tuple[Pass, ...]:
    """Return ``passes`` in the order above; equal names, and names it lacks, stay as given."""
    place = {name: position for position, name in enumerate(ORDER)}
    return tuple(sorted(passes, key=lambda one: place.get(one.name, len(ORDER))))
