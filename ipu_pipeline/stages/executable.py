"""What every target gives back: an executable that a thin training loop drives."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.amp import GradScaler
from typing_extensions import Self

from ipu_pipeline.capture.batch_axes import Axes
from ipu_pipeline.capture.named_ids import naming_ids
from ipu_pipeline.capture.values import nested_by_name
from ipu_pipeline.checkpoint import Attach, Background, read_checkpoint, write_checkpoint
from ipu_pipeline.errors import LoweringError, StageError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ops.master_weights import MasterWeights
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.calls import kv_cache_bytes
from ipu_pipeline.stages.loss_shares import LossWeights
from ipu_pipeline.stages.training import LossScaler

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: That of the batch: the microbatches' losses, each weighted by its part of what the
            loss is a mean over (samples, labels that count), or as ``loss_weights`` says.
        grad_norm: Norm over the gradients of ALL stages before clipping; ``None`` if not computed.
        skipped: An overflow was found (fp16 loss scaling): no weight was changed.
        num_samples: Samples in the batch.
        stage_s: Measured busy seconds per stage (forward and backward, all microbatches).
    """

    loss: float
    grad_norm: float | None = None
    skipped: bool = False
    num_samples: int = 0
    stage_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class EvalResult:
    """What one evaluation step computed.

    Attributes:
        loss: That of the batch, as in :class:`StepResult`; ``None`` when there are no labels.
        outputs: The model's outputs by name, microbatches joined on their axis of samples:
            tensors, and tuples and dicts of them.
    """

    loss: float | None
    outputs: Mapping[str, Any] = field(default_factory=dict)

    def nested(self) -> EvalResult:
        """Return the same, tensors named as members of tuples and dicts (``x[2]``) in them."""
        return EvalResult(self.loss, nested_by_name(self.outputs))


def mean_loss(microbatches: Sequence[Microbatch], results: Sequence[Mapping[str, Tensor]]) -> float:
    """Return the sum of the microbatches' weighted losses; one of weight 0 may have none (NaN)."""
    pairs = zip(microbatches, results, strict=True)
    return sum(float(result["loss"]) * part.share for part, result in pairs if part.share)


def join(
    microbatches: Sequence[Microbatch], results: Sequence[Mapping[str, Tensor]], axes: Axes
) -> EvalResult:
    """Put the microbatches' outputs together, on axis 0 unless ``axes`` says more."""
    loss = mean_loss(microbatches, results) if "loss" in results[0] else None
    outputs = {}
    for name in results[0]:
        values = [result[name] for result in results]
        if name != "loss":
            axis = axes.get(name, 0 if values[0].ndim else None)
            one = axis is None or len(values) == 1
            outputs[name] = values[0] if one else torch.cat(values, axis or 0)
    return EvalResult(loss, outputs)


@dataclass(frozen=True)
class ExecutionOptions:
    """How a plan is run; nothing here changes where a block is placed.

    Attributes:
        precision: ``float32``, ``bf16`` (autocast), or ``fp16`` (autocast + loss scaling).
        loss_scaling: Factor of the loss before the backward pass; gradients are divided by it
            before they are used, and a step that overflowed changes nothing. A number, or a
            ``torch.amp.GradScaler``, by whose rules it moves; ``None``: such a scaler with
            ``fp16``, else 1. All ranks skip the same steps.
        master_weights: Keep float32 copies of 16-bit weights in the optimizer's state and step
            those: the weights are the copies, rounded.
        max_grad_norm: Clip the norm of the gradients of all stages to this; ``None`` for none.
        seed: Root of every random number drawn while training.
        schedule: ``1f1b`` or ``gpipe``; ``None`` takes the plan's.
        sequential: Run the stages one after another in the calling thread (the reference).
        recompute: Blocks whose forward pass runs again in the backward pass: ``None`` for the
            plan's choice, ``all``, ``none``, or a list of names, prefixes of names, or patterns.
        offload_activations: Blocks whose activations wait for the backward pass in pinned host
            memory: ``None`` for the plan's choice, ``all``, ``none``, or as for ``recompute``,
            with which it composes. On CPUs it is refused.
        replicated_tensor_sharding: Divide optimizer state among the replicas, each of which then
            updates a part of the parameters (``distributed`` only; IPUs read ``ipu_config``).
        stall_timeout_s: Raise ``StallError`` after this many seconds without any progress.
        self_check: Compare every new capture with the model on other data before trusting it.
        ipu_config: What the plan does not say about IPUs (memory proportions, device iterations,
            optimizer off chip, ...); the ``poptorch`` target needs it where the plan was made with
            one, the ``local`` target refuses it.
        sdk_python: The Python of Graphcore's SDK, under which the ``poptorch`` target runs its
            worker; ``None`` takes the variable IPU_PIPELINE_SDK_PYTHON. ``PYTHON --emulate`` puts
            the stand-in in the place of poptorch.
        device: Where the weights go and batches are moved to: ``cuda`` (``distributed``: the GPU
            of the process's LOCAL_RANK), ``cuda:1``, ``cpu``; ``None`` leaves the weights where
            they are. The stages of one process share one device.
        compile_blocks: Run every block through ``torch.compile``; a block that it cannot compile
            whole, or that draws random numbers, is refused, one that is serialized or keeps what
            it changes runs as it is. Stages of ``local`` then run one after another.
        training: Whether steps will be trained; if not, ``eval_step`` is all there is, and the
            plan may have been made without labels.
        weights: Folder with the weights of a model on ``meta`` (safetensors, whole or in shards);
            each process reads those of its own stages. ``None``: they are initialised by the
            model's own code, the same ones for any split, from ``seed``.
        loss_weights: Weights of the microbatches' losses in the loss of the batch. ``None``: as
            the loss means it (labels that count, samples, or a sum); ``samples``; a function of a
            microbatch's inputs that returns how much it counts (tokens, say); or the factors of
            the microbatches of every training step themselves.
        batches: What a process passes to a training step where replicas of ``distributed`` are
            several: ``whole``, the batch of all of them, or ``share``, that part of it which its
            replica runs (:meth:`Executable.share_of`); an empty mapping where that is nothing.
            An evaluation batch is evaluated by every replica that is given it.
    """

    precision: str = "float32"
    loss_scaling: float | GradScaler | None = None
    master_weights: bool = False
    max_grad_norm: float | None = None
    seed: int = 42
    schedule: str | None = None
    sequential: bool = False
    recompute: str | Sequence[str] | None = None
    offload_activations: str | Sequence[str] | None = None
    replicated_tensor_sharding: bool = False
    stall_timeout_s: float = 600.0
    self_check: bool = True
    ipu_config: Any = None  # an IPUConfig, of the one backend that has it
    sdk_python: str | None = None
    device: str | torch.device | None = None
    compile_blocks: bool = False
    training: bool = True
    loss_weights: LossWeights = None
    batches: str = "whole"
    weights: str | Path | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bf16", "fp16"):
            raise ValueError(
                f"precision {self.precision!r} is unknown; use 'float32', 'bf16' or 'fp16'"
            )
        for name in ("recompute", "offload_activations"):
            wish = getattr(self, name)
            if isinstance(wish, str) and wish not in ("all", "none"):
                raise ValueError(
                    f"{name} {wish!r} is unknown; use 'all', 'none', None, or a list of names of "
                    "blocks"
                )
        if self.batches not in ("whole", "share"):
            raise ValueError(f"batches {self.batches!r} is unknown; use 'whole' or 'share'")
        if isinstance(self.loss_weights, str) and self.loss_weights != "samples":
            raise ValueError(
                f"loss_weights {self.loss_weights!r} is unknown; use 'samples', a list of factors, "
                "or a function of a microbatch's inputs"
            )
        self._check_device()
        self._check_numbers()
        for name in ("master_weights", "compile_blocks", "replicated_tensor_sharding"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _check_numbers(self) -> None:
        scaling = self.loss_scaling
        if isinstance(scaling, GradScaler):
            if not scaling.is_enabled():
                raise ValueError(
                    "loss_scaling is a GradScaler that is switched off (enabled=False, or its "
                    "device is not here); leave it out, or make it with GradScaler('cpu')"
                )
        elif scaling is not None:
            _check_above_0("loss_scaling", scaling, "or a torch.amp.GradScaler")
            if scaling == math.inf:
                raise ValueError("loss_scaling is inf, with which every step overflows")
        if self.max_grad_norm is not None:
            _check_above_0("max_grad_norm", self.max_grad_norm, "or None for no clipping")
        _check_above_0("stall_timeout_s", self.stall_timeout_s, "of seconds")

    def _check_device(self) -> None:
        try:
            known = self.device is None or torch.device(self.device).type != "meta"
        except RuntimeError:
            known = False
        if not known:
            raise ValueError(
                f"device {self.device!r} is unknown; use 'cuda', 'cuda:0', 'cpu', or None to leave "
                "the weights where they are"
            )

    def require_training(self) -> None:
        """Refuse a training step of what was compiled for evaluation.

        Raises:
            LoweringError: ``training`` is off.
        """
        if not self.training:
            raise LoweringError(
                "the model was compiled with training=False, for eval_step only; compile it again "
                "without that, from a plan that was made with labels"
            )

    def refuse_ipus(self, target: str) -> None:
        """Refuse options that only IPUs have, for another target.

        Raises:
            LoweringError: One is given.
        """
        if self.ipu_config is not None or self.sdk_python is not None:
            raise LoweringError(
                f"the {target} target runs on no IPU: leave ipu_config and sdk_python out, or use "
                "target='poptorch'"
            )


def _check_above_0(name: str, value: object, remedy: str) -> None:
    if not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} must be above 0, got {value!r}; give a number, {remedy}")


def _of_one_process(method: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a call in a forked copy of the process that made the executable: it would hang there.

    The copy closes nothing either, as what there is to close is not its own. Where the call goes
    on, an id that is in no row of a table is named.
    """

    @functools.wraps(method)
    def checked(self: Executable, *args: Any, **kwargs: Any) -> Any:
        if self._process == os.getpid():
            with naming_ids(self.model, StageError):
                return method(self, *args, **kwargs)
        if method.__name__ in ("close", "__exit__"):
            return None
        raise LoweringError(
            f"{method.__name__} was called in process {os.getpid()}, a forked copy of process "
            f"{self._process} that compiled the model: the threads that run it are not copied; use "
            "the executable where it was made, or compile in a process that is started with 'spawn'"
        )

    return checked


def _check_processes(cls: type[Any]) -> None:
    for name, method in list(vars(cls).items()):
        if inspect.isfunction(method) and (name == "__exit__" or not name.startswith("_")):
            setattr(cls, name, _of_one_process(method))


class Executable(ABC):
    """A compiled model. One thread drives it, of the process that made it; it is not reentrant.

    Args:
        model: The user's model; its parameters are trained in place.
        plan: The split.
        optimizer: Over ``model.parameters()``; needed by :meth:`train_step` only.
        options: How to run.

    Attributes:
        global_step: Optimizer steps tried (skipped ones included); random numbers are keyed by it,
            so that a resumed run draws what the uninterrupted run would have drawn.
        batch_divisor: Axis 0 of a training batch must be a multiple of it (1: any size; ``None``:
            of microbatches x replicas).
    """

    batch_divisor: int | None = 1

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        optimizer: torch.optim.Optimizer | None,
        options: ExecutionOptions | None = None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.optimizer = optimizer
        self.options = options or ExecutionOptions()
        self._scaler = LossScaler(self.options.loss_scaling, self.options.precision)
        self._masters: MasterWeights | None = None
        if self.options.master_weights and optimizer is not None:
            self._masters = MasterWeights(optimizer)
            if not self._masters.parameters():
                logger.warning(
                    "master_weights changes nothing: the optimizer has no 16-bit weight; load the "
                    "model with dtype=torch.bfloat16"
                )
        self.global_step = 0
        self._background = Background()
        self._process = os.getpid()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let every public method look first in which process it is called."""
        super().__init_subclass__(**kwargs)
        _check_processes(cls)

    @abstractmethod
    def train_step(self, batch: Mapping[str, Any]) -> StepResult:
        """Run one optimizer step on ``batch`` (axis 0: micro batch x microbatches x replicas)."""

    @abstractmethod
    def forward_backward(self, batch: Mapping[str, Any]) -> float:
        """Return the loss and add gradients to ``.grad`` of the model's own parameters."""

    @abstractmethod
    def eval_step(self, batch: Mapping[str, Any]) -> EvalResult:
        """Run the model in evaluation mode without gradients."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the model's own ``generate``, in evaluation mode; return what it returns.

        Arguments are those of transformers' ``generate``: inputs, a ``GenerationConfig`` or its
        fields, logits processors, stopping criteria, a streamer. In processes each of them passes
        the same ones and gets the same tokens; a stage has the KV cache of its own layers, which
        is not returned.

        Raises:
            LoweringError: The model does not generate, or the target cannot run it.
            StageError: A process failed.
        """
        return self._call_model("generate", [(args, kwargs)])[0]

    def generate_parts(self, parts: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[Any]:
        """Generate for batches of any shapes, which are in flight together where ranks are several.

        Args:
            parts: Inputs of each, by name.
            **kwargs: What is the same for all, as for :meth:`generate`.

        Returns:
            What :meth:`generate` alone returns for each: all draw from torch's generators as they
            are now.
        """
        return self._call_model("generate", [((), {**part, **kwargs}) for part in parts])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model in evaluation mode, without gradients, for inputs of any shape.

        The model's own code runs as a whole, so that nothing is captured. In processes each of
        them passes the same arguments and gets the same result, without caches.

        Raises:
            LoweringError: The target cannot run it.
            StageError: A process failed.
        """
        return self._call_model("forward", [(args, kwargs)])[0]

    def kv_cache_bytes(
        self, batch_size: int, length: int, encoder_length: int = 0
    ) -> tuple[int, ...]:
        """Return the predicted bytes of every stage's KV cache; see :mod:`.calls`."""
        return kv_cache_bytes(self.model, self.plan, batch_size, length, encoder_length)

    def _call_model(
        self, name: str, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> list[Any]:
        del calls
        raise LoweringError(
            f"this target runs programs that are compiled for fixed shapes, and those of {name} "
            "change from call to call (generate's with every token); compile a model with the "
            "weights of state_dict() for target='local', or use eval_step"
        )

    def share_of(self, num_samples: int) -> slice:
        """Return which samples of a batch this process passes to a training step."""
        return slice(num_samples)

    def trained_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer.

        Raises:
            LoweringError: There is none.
        """
        if self.optimizer is None:
            raise LoweringError("train_step needs an optimizer; pass one to compile(optimizer=...)")
        return self.optimizer

    def stepped(self, result: StepResult, steps: int = 1) -> StepResult:
        """Count optimizer steps that were tried, log the last one, and return ``result``."""
        self.global_step += steps
        skipped = ", skipped: a gradient is not finite" if result.skipped else ""
        logger.debug("step %d: loss %.6g, norm of gradients %s, %d samples%s", self.global_step,
                     result.loss, result.grad_norm, result.num_samples, skipped)  # fmt: skip
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Return the unsplit model's own state dict."""
        return self.model.state_dict()

    def save_checkpoint(
        self,
        path: str | Path,
        extra: Mapping[str, Any] | None = None,
        *,
        blocking: bool = True,
        attach: Attach | None = None,
    ) -> Path:
        """Write weights, optimizer, step counter and ``extra`` (JSON data) atomically.

        Args:
            path: The folder.
            extra: JSON data.
            blocking: ``False`` copies everything and writes while training goes on. The next
                save, load, :meth:`wait_for_checkpoint` or :meth:`close` waits for it and raises
                its error.
            attach: Called at once with the folder that becomes the checkpoint, to add files.

        Raises:
            CheckpointError: Something cannot be written as safetensors or JSON.
            OSError: The disk is full, for this checkpoint or for the one before.
        """
        self.wait_for_checkpoint()
        return write_checkpoint(
            path,
            model=self.model,
            optimizer=self.optimizer,
            global_step=self.global_step,
            extra=extra,
            loss_scaling=self._scaler.state(),
            attach=attach,
            background=None if blocking else self._background,
        )

    def broadcast(self, value: T) -> T:
        """Return what the first process has passed; every process of the executable calls this."""
        return value

    def wait_for_checkpoint(self) -> None:
        """Wait until every checkpoint is written."""
        self._background.wait()

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Restore what :meth:`save_checkpoint` wrote, from any split; return ``extra``."""
        self.wait_for_checkpoint()
        info = read_checkpoint(
            path, model=self.model, optimizer=self.optimizer, masters=self._masters
        )
        self.global_step = info.global_step
        self._scaler.load(info.loss_scaling)
        return info.extra

    def close(self) -> None:
        """Free what runs the model; calling it again does nothing."""
        self.wait_for_checkpoint()

    def __enter__(self) -> Self:
        """Return the executable; leaving the block closes it."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Close the executable."""
        try:
            self.close()
        except Exception:
            if error is None:  # otherwise it was logged, and the caller's own error goes on
                raise


_check_processes(Executable)
