"""How ranks write one checkpoint: torch.distributed.checkpoint against our files (decision 0017).

Every rank holds its own tensors, in eight pieces. Each way runs in turn; the first rank prints
seconds until the slowest rank is done, memory on top of the tensors, and how long the thread that
trains stood still (it held no lock of its own; Python's was held by the writer).

    python -m benchmarks.checkpoint_writers FOLDER [--ranks 2] [--mb 300] [--rounds 3]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ipu_pipeline.checkpoint.writer import Shard, on_host, write_shard
from ipu_pipeline.errors import OutputError
from ipu_pipeline.ir.files import make_folder

PIECES = 8


def by_dcp(state: dict[str, Tensor], folder: Path) -> None:
    """Save with torch's writer of safetensors, one file per rank."""
    dcp.save(state, storage_writer=_writer(folder))


def by_async_dcp(state: dict[str, Tensor], folder: Path) -> None:
    """Save with torch's writer in its own thread."""
    group = dist.new_group(backend="gloo")
    found: Any = dcp.async_save(state, storage_writer=_writer(folder), process_group=group)
    getattr(found, "upload_completion", found).result()


def by_files(state: dict[str, Tensor], folder: Path) -> None:
    """Save as the distributed target does, without its manifest."""
    part = Shard({"model": on_host(state, copy=False)})
    write_shard(folder, part, dist.get_rank(), dist.get_world_size())


def by_async_files(state: dict[str, Tensor], folder: Path) -> None:
    """Copy first, as for a save in the background."""
    part = Shard({"model": on_host(state, copy=True)})
    write_shard(folder, part, dist.get_rank(), dist.get_world_size())


WAYS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "dcp.save": by_dcp,
    "our files": by_files,
    "dcp.async_save": by_async_dcp,
    "our files, copied first": by_async_files,
}


def _writer(folder: Path) -> Any:
    ranks = range(dist.get_world_size())
    places = {_name(rank, piece): rank + 1 for rank in ranks for piece in range(PIECES)}
    return dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=places)


def _name(rank: int, piece: int) -> str:
    return f"layer.{rank}.{piece}"


def measure(way: str, folder: Path, mb: int) -> tuple[float, float, float]:
    """Return seconds, bytes on top in MB, and the longest standstill in seconds."""
    size = mb * 2**20 // 4 // PIECES
    state = {_name(dist.get_rank(), piece): torch.randn(size) for piece in range(PIECES)}
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    before = _peak_mb()
    start = last = time.perf_counter()
    writer = threading.Thread(target=WAYS[way], args=(state, folder))
    writer.start()
    still = 0.0
    while writer.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        still, last = max(still, now - last), now
    dist.barrier()
    return time.perf_counter() - start, _peak_mb() - before, still


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_new_process(rank: int, port: str, options: argparse.Namespace, way: str) -> None:
    """Measure where no earlier peak of memory hides this one."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=options.ranks)
    seconds, mb, still = measure(way, options.folder, options.mb)
    if rank == 0:
        print(f"{way:26} {seconds:6.2f} s  +{mb:5.0f} MB  standstill {still:.3f} s", flush=True)
        shutil.rmtree(options.folder)
    dist.destroy_process_group()


def main() -> None:
    """Run every way in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="made and removed")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mb", type=int, default=300, help="per rank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=29_721)
    options = parser.parse_args()
    try:
        make_folder("folder", options.folder, force=False)  # it is removed in the end
    except OutputError as error:
        parser.error(str(error))
    context = multiprocessing.get_context("spawn")
    for number in range(options.rounds * len(WAYS)):
        way = list(WAYS)[number % len(WAYS)]
        port = str(options.port + number)
        processes = [
            context.Process(target=_in_new_process, args=(rank, port, options, way))
            for rank in range(options.ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
