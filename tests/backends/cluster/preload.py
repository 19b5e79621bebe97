"""What every process of the tests has before it is forked: modules, and a plan to find them all."""

from __future__ import annotations

import gc

from tests.backends.cluster import jobs

gc.set_threshold(200_000, 20, 100)  # as the tests themselves
jobs.built("bert-qa", num_stages=2)
# Closing an executable collects garbage: not among what is here already.
gc.collect()
gc.freeze()
