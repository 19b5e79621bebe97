"""One checkpoint from ranks that each write what they own, and loading one on every rank.

The first rank makes a hidden folder, every rank writes its files into it, and when all of them
are on the disk the first rank writes the manifest and renames the folder. A failure on any rank
leaves earlier checkpoints as they are and is raised by all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.ranks.consistency import together
from ipu_pipeline.backends.cluster.ranks.rendezvous import StoreGather
from ipu_pipeline.backends.cluster.sharding import Ownership, OwnParameters, to_first_rank
from ipu_pipeline.checkpoint import (
    Attach,
    Background,
    CheckpointInfo,
    check_share,
    prepare_loading,
    restore_previous,
)
from ipu_pipeline.checkpoint.optimizer_state import OPTIMIZER
from ipu_pipeline.checkpoint.slices import UNCUT, Slices
from ipu_pipeline.checkpoint.weights import extra_state
from ipu_pipeline.checkpoint.writer import (
    CheckpointWriter,
    Shard,
    WrittenFiles,
    take_shard,
    write_shard,
)
from ipu_pipeline.errors import CheckpointError
from ipu_pipeline.ops.master_weights import MasterWeights

logger = logging.getLogger(__name__)

# A network file system may show a new folder to other machines a little later.
SEEN_S = 5.0


def collect_weights(model: nn.Module, ownership: Ownership, groups: Groups) -> None:
    """Fill the model of every rank with the weights and buffers of those who train them."""
    distinct = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    for tensor in distinct.values():
        if id(tensor) in ownership.cut:
            continue  # joined by who has the rows
        groups.from_position(tensor, ownership.owner(tensor))


class ShardedCheckpoints:
    """Writes and reads the checkpoints of one executable, one at a time.

    ``background`` makes the all-gathers of the thread that writes while training goes on.
    ``slices`` are those that are here; ``is_held`` says by name which tensors have values here,
    ``None``: all of them. ``masters`` are the optimizer's float32 copies of weights, if it steps
    those.
    """

    def __init__(
        self,
        model: nn.Module,
        own: OwnParameters | None,
        groups: Groups,
        background: StoreGather,
        slices: Slices = UNCUT,
        is_held: Callable[[str], bool] | None = None,
        masters: MasterWeights | None = None,
    ) -> None:
        self._is_held = is_held
        self._slices = slices
        self._masters = masters
        self._model = model
        self._own = own
        self._optimizer = None if own is None else own.optimizer
        self._groups = groups
        self._ranks = groups.ranks
        self._writers = background
        self._rank = groups.ranks.rank
        self._background = Background()
        self._not_shared: set[Path] = set()

    def load(self, path: str | Path, ownership: Ownership | None) -> CheckpointInfo:
        """Load a checkpoint on every rank; each keeps the optimizer state of its own parameters.

        Raises:
            CheckpointError: On any rank: damaged, incomplete, newer, or of another model.
        """
        self.wait()
        # A replacement that was cut off is finished by one rank before any reads.
        together(self._ranks, lambda: restore_previous(Path(path)) if self._rank == 0 else None)
        together(self._ranks, lambda: check_share(path, self._rank, dist.get_world_size()))
        if self._own is not None:
            self._own.restore()
        ready: list[Callable[[], CheckpointInfo]] = []
        found: list[CheckpointInfo] = []
        try:
            together(
                self._ranks,
                lambda: ready.append(
                    prepare_loading(
                        path,
                        model=self._model,
                        optimizer=self._optimizer,
                        is_held=self._is_held or (lambda _: True),
                        slices=self._slices,
                        masters=self._masters,
                    )
                ),
            )
            together(self._ranks, lambda: found.append(ready[0]()))
        finally:
            if self._own is not None and ownership is not None:
                self._own.keep(ownership)
        return found[0]

    def save(
        self,
        path: str | Path,
        ownership: Ownership | None,
        global_step: int,
        loss_scaling: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        *,
        blocking: bool = True,
        attach: Attach | None = None,
    ) -> Path:
        """Write a checkpoint, or begin to. Every rank calls this.

        Raises:
            CheckpointError: Something cannot be written as safetensors or JSON; or each rank has
                its own weights only, and nothing has run yet or the ranks do not share a disk.
            OSError: The disk is full, or not writable; for this checkpoint or for the one
                before. Earlier checkpoints are untouched.
        """
        self.wait()
        _refuse_extra_state(self._model)
        if self._is_held is not None and ownership is None:
            raise CheckpointError(
                "which process writes which weights is known after the first step or evaluation; "
                "run one before you save"
            )
        new: CheckpointWriter | None = None
        with ExitStack() as undo:

            def begin() -> tuple[str, list[str]]:
                nonlocal new
                if self._rank == 0:
                    new = CheckpointWriter(
                        path,
                        model=self._model,
                        optimizer=self._optimizer,
                        groups=None if self._own is None else self._own.groups(),
                        global_step=global_step,
                        extra=extra,
                        loss_scaling=loss_scaling,
                        attach=attach,
                        slices=self._slices,
                    )
                    undo.enter_context(new.or_nothing())
                here = [] if self._own is None else self._own.names_with_state(self._model)
                return "" if new is None else str(new.folder), here

            begun = together(self._ranks, begin)
            folder = Path(begun[0][0])
            # Of those that have the same slices, the first one writes.
            earlier = begun[self._slices.index : self._rank : self._slices.size]
            before = {name for _, names in earlier for name in names}
            states = frozenset(begun[self._rank][1]) - (before - self._names_of_rows())
            part, writers = self._take(folder, states, ownership, copy=not blocking)
        if blocking:
            self._write(new, folder, part, writers)
        else:
            self._background.start(lambda: self._write(new, folder, part, writers))
        return Path(path)

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            CheckpointError, OSError: It was not; the same on every rank, once.
            GivenUp: Some rank has failed.
        """
        self._background.wait(self._groups.waiter.give_up_after_failure)

    def _take(
        self, folder: Path, states: frozenset[str], ownership: Ownership | None, *, copy: bool
    ) -> tuple[Shard, Sequence[int]]:
        """Return what this rank writes, and which ranks write anything."""
        layout = self._groups.layout

        def is_mine(tensor: Tensor) -> bool:
            if self._slices.size == 1 and self._slices.is_cut(tensor):
                return layout.replica == 0
            owner = 0 if ownership is None else ownership.owner(tensor)
            return layout.replica == 0 and layout.position == owner

        part = Shard({})

        def take() -> tuple[bool, bool]:
            nonlocal part
            part = take_shard(
                self._model,
                self._optimizer,
                copy=copy,
                weights=is_mine,
                states=states.__contains__,
                slices=self._slices,
            )
            return folder.parent not in self._not_shared and _appears(folder), part.is_empty

        found = together(self._ranks, take)
        blind = [rank for rank, (seen, _) in enumerate(found) if not seen]
        if not blind:
            return part, [rank for rank, (_, empty) in enumerate(found) if not empty] or [0]
        if self._is_held is not None or self._slices.cuts:
            raise CheckpointError(
                f"ranks {blind} do not see the folder of rank 0 ({folder.parent}), and no process "
                "has the whole model; save to a file system that all machines share"
            )
        if folder.parent not in self._not_shared:
            self._not_shared.add(folder.parent)
            logger.warning(
                "ranks %s do not see the folder of rank 0 (%s), so rank 0 gathers the whole model "
                "and writes it; use a file system that all machines share, or copy a checkpoint "
                "to every machine before it is loaded",
                blind,
                folder.parent,
            )
        return self._gathered(part, ownership, copy=copy), [0]

    def _names_of_rows(self) -> frozenset[str]:
        """Return the parameters of which this rank has rows that it joins with those of others."""
        if self._slices.size > 1 or self._groups.layout.replica:
            return frozenset()
        named = self._model.named_parameters()
        return frozenset(name for name, p in named if self._slices.is_cut(p))

    def _gathered(self, part: Shard, ownership: Ownership | None, *, copy: bool) -> Shard:
        """Return all parts in one on the first rank."""
        if ownership is not None:
            collect_weights(self._model, ownership, self._groups)
        mine = part.tensors.get(OPTIMIZER, {})
        tensors, values = to_first_rank(mine, part.values, self._groups)
        if self._rank != 0:
            return Shard({})
        whole = take_shard(self._model, None, copy=copy)
        return Shard({**whole.tensors, OPTIMIZER: tensors}, values)

    def _write(
        self, new: CheckpointWriter | None, folder: Path, part: Shard, writers: Sequence[int]
    ) -> None:
        def own_files() -> tuple[WrittenFiles, Mapping[str, Any]]:
            if self._rank not in writers:
                return {}, {}
            files = write_shard(folder, part, writers.index(self._rank), len(writers))
            return files, part.values

        with nullcontext() if new is None else new.or_nothing():
            found = together(self._writers, own_files)
            files = {name: entry for own, _ in found for name, entry in own.items()}
            values = {name: entry for _, own in found for name, entry in own.items()}
            together(self._writers, lambda: None if new is None else new.finish(files, values))


def _refuse_extra_state(model: nn.Module) -> None:
    names = list(extra_state(model))
    if names:  # of the stages of other ranks, this one has the first state only
        raise CheckpointError(
            f"{names[0]} (get_extra_state) is no tensor, and each process has that of its own "
            "stages only; make it a buffer, or train with target='local'"
        )


def _appears(folder: Path) -> bool:
    deadline = time.monotonic() + SEEN_S
    while not folder.is_dir():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
