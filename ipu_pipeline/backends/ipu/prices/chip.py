"""The facts of an IPU and its pod, and the calibration of the time model.

The calibration is few constants with a meaning, the same for GC200 and Bow. Everything else is a
published fact (``ir/data/machines.json``, code sizes in ``memory.py``), a property of an algorithm
(passes over the data, ``operations.py``) or counted from the graph. ``benchmarks/ipu_fit.py``
finds these values again from published measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import ipu_facts

WORKERS_PER_TILE = 6
IPU_KIND = "ipu-"


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


@dataclass(frozen=True)
class Chip:
    """One IPU with its share of the board, and the links to its neighbours.

    Attributes:
        name: Family, such as ``ipu-bow``.
        tiles: Processor tiles, each with its own memory.
        tile_memory_bytes: Memory of one tile.
        clock_hz: Tile clock.
        macs_per_cycle_16: Multiply-adds per tile and cycle on float16 with float16 partial sums.
        macs_per_cycle_16_32: The same with float32 partial sums.
        macs_per_cycle_32: The same on float32.
        exchange_bytes_per_cycle: Bytes one tile receives per cycle over the on-chip exchange.
        links: Bytes per second, one direction, to the neighbours on the board, fastest first.
        board_link_bytes_per_s: Bytes per second, one direction, of one IPU to another board.
        rack_link_bytes_per_s: The same between racks of 64 IPUs, through the gateways.
        streaming_bytes_per_s: Streaming memory of one board, shared by its IPUs.
        host_bytes_per_s: Network to the host of one board, shared by its IPUs.
        ipus_per_board: IPUs on one board.
        ipus_per_rack: IPUs that IPU-Links connect directly.
        link_latency_s: Seconds until the first byte of a copy between two IPUs.
        calibration: Constants of the time model.
    """

    name: str
    tiles: int
    tile_memory_bytes: int
    clock_hz: float
    macs_per_cycle_16: int
    macs_per_cycle_16_32: int
    macs_per_cycle_32: int
    exchange_bytes_per_cycle: float
    links: tuple[float, ...]
    board_link_bytes_per_s: float
    rack_link_bytes_per_s: float
    streaming_bytes_per_s: float
    host_bytes_per_s: float
    ipus_per_board: int
    ipus_per_rack: int
    link_latency_s: float
    calibration: Calibration = DEFAULT_CALIBRATION

    @property
    def memory_bytes(self) -> int:
        """Memory of the whole chip."""
        return self.tiles * self.tile_memory_bytes

    def without(self, num_io_tiles: int | None) -> Chip:
        """Return the chip as its compute tiles: with so many fewer tiles."""
        return replace(self, tiles=self.tiles - (num_io_tiles or 0))

    def macs_per_cycle(self, precision: str) -> int:
        """Multiply-adds per tile and cycle for ``16.16``, ``16.32`` or ``32.32``."""
        return {
            "16.16": self.macs_per_cycle_16,
            "16.32": self.macs_per_cycle_16_32,
            "32.32": self.macs_per_cycle_32,
        }[precision]

    def link_bytes_per_s(self, first: int, second: int) -> float:
        """Bytes per second, one direction, between two IPUs of a pod.

        A board is a square: IPUs 2i and 2i+1 share four links, the other sides two; its diagonal
        and every other board are reached over two links.
        """
        if first // self.ipus_per_rack != second // self.ipus_per_rack:
            return self.rack_link_bytes_per_s
        if first // self.ipus_per_board != second // self.ipus_per_board:
            return self.board_link_bytes_per_s
        return self.links[0] if first // 2 == second // 2 else self.links[-1]


def is_ipu(machine: Machine) -> bool:
    """Whether the machine's devices are IPUs (their ``kind`` says so)."""
    return machine.devices[0].kind.startswith(IPU_KIND)


def chip_of(machine: Machine) -> Chip:
    """Return the facts of the IPUs of ``machine``.

    Raises:
        PlanError: Its devices are no IPUs, or of an unknown generation.
    """
    kind = machine.devices[0].kind
    if not is_ipu(machine):
        raise PlanError(
            f"machine {machine.name!r} has devices of kind {kind!r}; the IPU model prices pod4, "
            "pod16, ..., bow-pod16, ... and machine files whose devices say kind ipu-gc200 or "
            "ipu-bow"
        )
    return chip_named(kind)


def chip_named(kind: str) -> Chip:
    """Return the facts of a generation: ``ipu-gc200`` or ``ipu-bow``.

    Raises:
        PlanError: The generation is unknown.
    """
    facts = ipu_facts(kind)
    return Chip(name=kind, **{**facts, "links": tuple(facts["links"])})
