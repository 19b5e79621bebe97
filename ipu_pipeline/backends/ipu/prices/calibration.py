"""The calibration of the IPU model: few constants with a meaning, the same for GC200 and Bow.

Everything else is a published fact (``ir/data/machines.json``, code sizes in ``memory.py``), a
property of an algorithm (passes over the data, ``operations.py``) or counted from the graph.
``benchmarks/ipu_fit.py`` finds these values again from published measurements.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Calibration:
    """Constants found by ``python -m benchmarks.ipu_fit`` (at most eight, all of them here).

    Attributes:
        amp_block_cycles: Cycles a tile spends on each 16x16 block of weights besides its
            multiply-adds: loading the block and starting the six workers. Published on-tile
            products show 331 with the launch of the whole product included.
        vector_bytes_per_cycle: Bytes read and written per tile and cycle by elementwise float16
            work, the copies between tile layouts that precede it included, which is why it is
            far below what the load and store units allow (two 8-byte loads and a store: 24).
        launch_cycles: Cycles between two operations: synchronising the tiles and starting the
            next program step.
        exchange_share: Share of the exchange's peak that moving operands and transposing reach.
        copy_share: Share of the IPU-Links' peak that stage copies and all-reduce reach.
        step_host_s: Seconds per return to the host: collecting results, the next batch, a new
            learning rate.
        poptorch_factor: Device time of a PopTorch program over PopART's for one layout.
        tensor_update_s: Seconds per parameter tensor and optimizer step: each has its own chain
            of small program steps (reduction over replicas, norms, moments, weight, gather).
    """

    amp_block_cycles: float = 62.47
    vector_bytes_per_cycle: float = 1.993
    launch_cycles: float = 1179.0
    exchange_share: float = 0.7492
    copy_share: float = 0.7782
    step_host_s: float = 0.0264
    poptorch_factor: float = 1.08
    tensor_update_s: float = 0.0001799


DEFAULT_CALIBRATION = Calibration()
