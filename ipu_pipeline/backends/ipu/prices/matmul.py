"""Matrix products on one IPU: how Poplar would spread one over the tiles, and how long it takes.

A product of ``groups`` x [m, k] @ [k, n] is cut into parts along m, k and n, one part per tile.
Its time is what the slowest tile needs:

* compute: the accumulating unit (AMP) holds a 16x16 block of one operand and streams rows of the
  other through it, so a part costs ``blocks * (rows * 256 / macs_per_cycle + amp_block_cycles)``.
  Sizes that 16 does not divide are padded, tiles left over idle: this is the quantisation.
* exchange: every tile receives its two operand parts, and its share of the partial sums where k
  was cut, at ``exchange_bytes_per_cycle``.
* memory: operands and partial sums of a part must fit into the available memory proportion of a
  tile; else the part runs in slices, which receive one operand again and again.

The plan is the cheapest of a grid of cuts; either operand may be the one that is held.

Source: the on-tile product timings of tessellate-ipu (cycles = 4 N + c for [N,16] x [16,16]) and
the description of availableMemoryProportion in Graphcore's memory tech note, both as recorded in
``shared/data/ipu/hardware.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, gcd

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.backends.ipu.prices.chip import Chip

FloatArray = NDArray[np.float64]
AMP_BLOCK = 16
ACCESS_BYTES = 8
_K_CUTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_M_CUTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 23, 26, 30, 32, 38, 46, 52, 64, 80, 92, 128,
           184, 256, 368, 512, 736, 1472)  # fmt: skip


@dataclass(frozen=True)
class Product:
    """``groups`` independent products [m, k] @ [k, n]."""

    groups: int
    m: int
    k: int
    n: int

    @property
    def macs(self) -> int:
        """Multiply-adds of all groups."""
        return self.groups * self.m * self.k * self.n


@dataclass(frozen=True)
class MatmulPlan:
    """How one product runs.

    Attributes:
        cycles: Tile cycles from launch to result.
        compute_cycles: Part of them in the AMP.
        exchange_cycles: Part of them receiving operands and partial sums.
        temporary_bytes: Operands and partial sums on one tile while it runs.
        slices: Slices that the memory proportion forced.
    """

    cycles: float
    compute_cycles: float
    exchange_cycles: float
    temporary_bytes: float
    slices: int


@dataclass(frozen=True)
class _Candidates:
    """Every cut of one product as columns; nothing in here depends on the calibration.

    Attributes:
        streamed: Cycles of multiply-adds.
        blocks: 16x16 blocks that a tile loads.
        received: Bytes that a tile receives.
        launches: Program steps.
        temporary: Bytes of operands and partial sums on a tile, at most the memory proportion.
        slices: Slices that the memory proportion forces.
    """

    streamed: FloatArray
    blocks: FloatArray
    received: FloatArray
    launches: FloatArray
    temporary: FloatArray
    slices: FloatArray


@lru_cache(maxsize=100_000)
def plan_matmul(product: Product, chip: Chip, precision: str, proportion: float) -> MatmulPlan:
    """Return the fastest plan of ``product``.

    Args:
        product: Sizes.
        chip: The IPU, with its calibration.
        precision: ``16.16``, ``16.32`` or ``32.32``: bits of operands and of partial sums.
        proportion: Available memory proportion: share of a tile's memory for one product.
    """
    calibration = chip.calibration
    tile_bytes = int(max(proportion, 0.01) * chip.tile_memory_bytes)
    found = _candidates(product, precision, chip.tiles, chip.macs_per_cycle(precision), tile_bytes)
    compute = found.streamed + found.blocks * calibration.amp_block_cycles
    peak = chip.exchange_bytes_per_cycle * calibration.exchange_share
    cycles = compute + found.received / peak + found.launches * calibration.launch_cycles
    best = int(np.argmin(cycles))
    return MatmulPlan(
        cycles=float(cycles[best]),
        compute_cycles=float(compute[best]),
        exchange_cycles=float(found.received[best] / peak),
        temporary_bytes=float(found.temporary[best]),
        slices=int(found.slices[best]),
    )


@lru_cache(maxsize=100_000)
def _candidates(
    product: Product, precision: str, tiles: int, macs_per_cycle: int, tile_bytes: int
) -> _Candidates:
    """List the cuts with either operand held; groups beyond the tiles run in rounds."""
    element = 4 if precision == "32.32" else 2
    partial_size = 2 if precision == "16.16" else 4
    rounds = ceil(product.groups / tiles)
    per_group = max(1, tiles // product.groups)
    first = _parts(product.m, product.k, product.n, per_group)
    second = _parts(product.n, product.k, product.m, per_group)
    rows, inner, columns, cut_k = np.concatenate([first, second], axis=1)
    blocks = (inner / AMP_BLOCK) * (columns / AMP_BLOCK)
    left, right = rows * inner * element, inner * columns * element
    partial = rows * columns * np.where(cut_k > 1, partial_size, element)
    temporary = left + right + partial
    slices = np.ceil(temporary / tile_bytes)
    # What the exchange moves: short rows of an operand waste part of every access.
    straight = np.arange(rows.size) < first.shape[1]
    by_k, by_n = access_waste(product.k, element), access_waste(product.n, element)
    left = left * np.where(straight, by_k, by_n)
    right = right * np.where(straight, by_n, by_k)
    partial = partial * by_n
    shared, other = np.minimum(left, right), np.maximum(left, right)
    return _Candidates(
        streamed=rounds * blocks * rows * AMP_BLOCK * AMP_BLOCK / macs_per_cycle,
        blocks=rounds * blocks,
        received=rounds * (shared * slices + other + partial * (cut_k - 1) / cut_k),
        launches=slices * np.where(cut_k > 1, 2, 1) + (rounds - 1),
        temporary=np.minimum(temporary, tile_bytes),
        slices=slices,
    )


def access_waste(row_elements: int, element_bytes: int) -> float:
    """Return accesses per useful access for rows of ``row_elements``.

    Tiles load and store 8 bytes at aligned addresses. Rows of a multiple of 8 bytes fill every
    access; rows of a multiple of 4 need twice as many; odd float16 rows start anywhere, so every
    element is an access of its own.
    """
    per_access = ACCESS_BYTES // element_bytes
    return per_access / gcd(row_elements, per_access)


def _parts(rows: int, inner: int, columns: int, tiles: int) -> FloatArray:
    """Return rows, padded k, padded columns of the largest part, and the cuts of k."""
    cut_k = np.minimum(np.array(_K_CUTS), ceil(inner / AMP_BLOCK))[:, None]
    cut_m = np.minimum(np.array(_M_CUTS), rows)[None, :]
    cut_k, cut_m = (axis.ravel() for axis in np.broadcast_arrays(cut_k, cut_m))
    possible = cut_k * cut_m <= tiles
    cut_k, cut_m = cut_k[possible], cut_m[possible]
    cut_n = np.minimum(tiles // (cut_k * cut_m), ceil(columns / AMP_BLOCK))
    return np.stack(
        [
            np.ceil(rows / cut_m),
            np.ceil(inner / cut_k / AMP_BLOCK) * AMP_BLOCK,
            np.ceil(columns / cut_n / AMP_BLOCK) * AMP_BLOCK,
            cut_k.astype(float),
        ]
    )
