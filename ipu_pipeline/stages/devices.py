"""Where the weights of a run are: choosing the device, moving there, and what an OOM there says."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.errors import LoweringError, first_line

logger = logging.getLogger(__name__)


def device_of(model: nn.Module) -> torch.device:
    """Return where the weights of a model are; of one without values the CPU."""
    found = (p.device for p in model.parameters() if not p.is_meta)
    return next(found, torch.device("cpu"))


def chosen_device(
    wish: str | torch.device | None, model: nn.Module, *, by_local_rank: bool = False
) -> torch.device:
    """Return the device of a run; ``None`` leaves weights where they are.

    Args:
        wish: A device, or a type of devices: then the present one.
        model: The model.
        by_local_rank: Of a type, take the device of this process's number on its machine.

    Raises:
        LoweringError: There is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if wish is None:
        device = device_of(model)
        if device.type == "cpu" and accelerator is not None:
            logger.warning(
                "the weights of %s are on the CPU and stay there, and so does the run; to run on "
                "%s, compile with device=%r", type(model).__name__, accelerator, accelerator.type,
            )  # fmt: skip
        return device
    device = torch.device(wish)
    if device.type == "cpu":
        return torch.device("cpu")
    if accelerator is None or accelerator.type != device.type:
        raise LoweringError(
            f"device {str(wish)!r} is not here: torch finds "
            f"{'no accelerator' if accelerator is None else accelerator.type}; leave device out "
            "to run where the weights are, or install a torch that drives it"
        )
    count = torch.accelerator.device_count()
    index: int | None = device.index
    if index is None:
        index = _local_rank() if by_local_rank else torch.accelerator.current_device_index()
    if index >= count:
        raise LoweringError(
            f"device {device.type}:{index} is not here: this machine shows {count} of them; start "
            "one process for each, or say which one"
        )
    return torch.device(device.type, index)


def _local_rank() -> int:
    rank = os.environ.get("LOCAL_RANK", "")
    if not rank.isdecimal():
        raise LoweringError(
            "which device belongs to this process is not known: LOCAL_RANK is not set, as torchrun "
            "does; set it, or give each process its own, such as device='cuda:1'"
        )
    return int(rank)


def move(model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device) -> None:
    """Move a model, its parameters staying what they are, and an optimizer's state."""
    if all(t.device == device for t in (*model.parameters(), *model.buffers())):
        return
    model._apply(lambda tensor: moved(tensor, device))
    if optimizer is not None and optimizer.state:
        optimizer.load_state_dict(optimizer.state_dict())  # torch puts it beside the weights


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; one over less memory than it has elements stays so."""
    storage = tensor.untyped_storage()
    if storage.nbytes() >= tensor.nbytes:
        return tensor.to(device)
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
    return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch whose tensors are on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


@contextmanager
def naming_snapshots() -> Iterator[None]:
    """Let an error for want of device memory say where the allocator's snapshot is.

    Raises:
        torch.OutOfMemoryError: As it was raised, with that sentence.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{first_line(error)}; {_snapshot()}") from error


def _snapshot() -> str:
    rank = os.environ.get("RANK", "0")
    path = Path(tempfile.gettempdir()) / f"ipu-pipeline-oom-rank{rank}-{os.getpid()}.pickle"
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception as error:  # it must not hide what it is about
        return f"a snapshot of the memory could not be written ({first_line(error)})"
    return (
        f"a snapshot of the memory is in {path}, to be looked at with "
        "https://docs.pytorch.org/memory_viz (for the lines of code, call "
        "torch.cuda.memory._record_memory_history() before); recompute more blocks, use more "
        "stages or microbatches, or a smaller micro batch"
    )
