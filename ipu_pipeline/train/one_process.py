"""Let transformers' loop see one process where a pipeline runs in several.

The processes of a pipeline are no data-parallel workers: each is given the same whole batches, and
the stages take what they use. transformers and accelerate would divide the data by the number of
processes, wrap the model in ``DistributedDataParallel`` and gather results that all processes have.
So the arguments and the accelerator of the trainer say that there is one process; what is left of
the place of this one is that only the first one writes and prints.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import PartialState  # type: ignore[import-untyped]
from accelerate.utils import DistributedType, operations  # type: ignore[import-untyped]
from accelerate.utils.operations import recursively_apply  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.utils import logging

from ipu_pipeline.train.arguments import process_index

logger = logging.get_logger(__name__)
Clip = Callable[[Any, float], Tensor]


def as_one_process(arguments: TrainingArguments) -> TrainingArguments:
    """Return the same arguments for a job of one process, of which only the first one writes.

    They are the given ones: what is set in either is set in both, and they are saved as those.
    """
    kind, state = type(arguments), _alone(PartialState(cpu=True))
    members = {
        "__module__": kind.__module__,
        "__reduce_ex__": lambda *_: (copy.copy, (arguments,)),
        "distributed_state": property(lambda _: state),
        "world_size": property(lambda _: 1),
    }
    found: TrainingArguments = object.__new__(type(kind.__name__, (kind,), members))
    found.__dict__ = vars(arguments)
    counted: Any = getattr(arguments, "generation_batch_size", None)
    steps: Any = getattr(arguments, "steps_per_generation", None)
    if counted and steps:  # TRL has counted the prompts of as many copies of the trainer
        number = arguments.per_device_train_batch_size * steps
        if number != counted:
            logger.warning(
                "generation_batch_size is %d, of the one copy of the pipeline in all processes; "
                "it was %d, counted for one in each", number, counted
            )  # fmt: skip
        vars(found)["generation_batch_size"] = number
    return found


def _alone(state: Any) -> Any:
    """Return accelerate's state as that of a job of one process; others share the original."""
    found = copy.copy(state)
    found.distributed_type = DistributedType.NO
    found.num_processes = 1
    found.process_index = process_index()
    found.local_process_index = int(os.environ.get("LOCAL_RANK", process_index()))
    return found


def random_states() -> list[Any]:
    """Return the states of Python's, numpy's and torch's random generators as plain data."""
    of_numpy: Any = np.random.get_state()  # noqa: NPY002
    name, keys, *rest = of_numpy
    torchs = torch.get_rng_state().numpy().tobytes()
    return [random.getstate(), [name, np.asarray(keys).tolist(), *rest], torchs]


def set_random_states(states: Sequence[Any]) -> None:
    """Set what :func:`random_states` has returned, perhaps in another process."""
    (version, numbers, gauss), (name, keys, *rest), torchs = states
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(torch.frombuffer(bytearray(torchs), dtype=torch.uint8))


@contextlib.contextmanager
def alone_in_accelerate() -> Iterator[None]:
    """Let accelerate's functions (``gather``, ``reduce``, ...) see one process, as its class does.

    Trainers call them besides the accelerator's methods. They still wait for each other.
    """
    before = operations.PartialState
    state = _alone(before())
    operations.PartialState = lambda *_, **__: state
    try:
        yield
    finally:
        operations.PartialState = before


class WholeBatchAccelerator(Accelerator):
    """An ``Accelerator`` in processes that are all given the same whole batches.

    Nothing is divided, wrapped or gathered. Gradients are clipped by their norm over all processes.
    """

    _clip: Clip

    @classmethod
    def of(cls, accelerator: Any, clip: Clip) -> WholeBatchAccelerator:
        """Make one of an accelerator that was just made, and of what clips gradients."""
        accelerator.__class__ = cls
        accelerator.state = _alone(accelerator.state)
        accelerator._clip = clip
        # Each process reads a dataset without a length, too.
        accelerator.dataloader_config.dispatch_batches = False
        return accelerator

    def prepare_data_loader(self, data_loader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """Prepare a loader; its workers have the seeds that they have in one process."""
        begin = data_loader.worker_init_fn
        if isinstance(begin, partial) and "rank" in begin.keywords:
            data_loader.worker_init_fn = partial(begin, rank=0)
        return super().prepare_data_loader(data_loader, *args, **kwargs)

    @property
    def process_index(self) -> int:
        """The first and only one, for code that takes its part of what was gathered."""
        return 0

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> Tensor:
        """Clip by the norm over the gradients of all processes.

        Raises:
            ValueError: It is another norm.
        """
        if norm_type != 2:
            raise ValueError(
                f"gradients of several processes are clipped by their norm of type 2, not "
                f"{norm_type}; leave norm_type out, or use target='local'"
            )
        return self._clip([parameters] if isinstance(parameters, Tensor) else parameters, max_norm)

    def gather(self, tensor: Any) -> Any:
        """Return what every process has."""
        return tensor

    def gather_for_metrics(
        self,
        input_data: Any,
        use_gather_object: bool = False,  # noqa: FBT001, FBT002 - the inherited signature
    ) -> Any:
        """Return what every process has, cut as in one process: to the samples that there are."""
        try:
            recursively_apply(lambda tensor: tensor, input_data, error_on_other_type=True)
        except TypeError:
            use_gather_object = True
        if not use_gather_object:
            return super().gather_for_metrics(input_data)
        remainder = self.gradient_state.remainder
        with contextlib.suppress(TypeError):
            if self.gradient_state.end_of_dataloader and remainder > 0:
                return input_data[:remainder]
        return input_data

    def reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
        """Return what every process has."""
        return tensor

    def pad_across_processes(self, tensor: Any, *_: Any, **__: Any) -> Any:
        """Return what every process has in one size."""
        return tensor

    def wait_for_everyone(self) -> None:
        """Wait until every process is here."""
        dist.barrier()
