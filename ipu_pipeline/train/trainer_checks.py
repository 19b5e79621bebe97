"""What transformers' training arguments can ask for and a pipeline in one process cannot do."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments
from transformers.debug_utils import DebugOption

from ipu_pipeline.ir.plan import Plan

_OTHER_RUNTIMES = {
    "fsdp": "it shards the model over processes, and the plan places whole blocks",
    "deepspeed": "it brings its own engine in place of the pipeline",
    "parallelism_config": "the plan is what splits the model",
    "torch_compile": "stages run the model's own modules",
    "use_liger_kernel": "its kernels need a GPU",
    "auto_find_batch_size": "a plan is made for one size of microbatch",
    "fp16": "transformers has no fp16 on CPUs; use bf16=True",
    "async_save": "transformers writes the checkpoints, and training waits for them",
    "stochastic_rounding": "transformers makes the optimizer; pass "
    "optimizers=(ipu_pipeline.ops.adamw.StochasticRoundingAdamW(...), None)",
    "replicated_tensor_sharding": "there is one copy of the pipeline",
    "master_weights": "transformers steps the optimizer; use ipu_pipeline.train.train",
}
# They change weights inside the backward pass, where stages run at the same time.
_IN_BACKWARD = ("lomo", "layerwise")
_CHECKPOINTING = frozenset({"use_reentrant"})


# What the pipeline replaces, or what would surround a call of the model that runs elsewhere.
_REPLACED = {
    "training_step": "the pipeline has its own",
    "compute_loss_context_manager": "the model runs in the stages, outside of that context",
    "autocast_smart_context_manager": "the model runs in the stages, outside of that context",
}


def check_class(cls: type, ours: type) -> None:
    """Refuse a trainer class of which something would be ignored.

    Args:
        cls: The class that is constructed.
        ours: ``PipelineTrainer``, whose base is transformers' ``Trainer``.

    Raises:
        ValueError: Another trainer class stands before ours, or a method would never be called.
    """
    theirs = ours.__bases__[0]
    before = [c for c in cls.__mro__[: cls.__mro__.index(ours)] if not issubclass(c, ours)]
    for base in before:
        if issubclass(base, theirs):
            raise ValueError(
                f"{cls.__name__} has {base.__name__} before PipelineTrainer, which then never gets "
                f"its arguments; write class {cls.__name__}(PipelineTrainer, {base.__name__})"
            )
    for name, reason in _REPLACED.items():
        # A training_step before ours calls ours.
        first = cls.__mro__.index(ours) + 1 if name == "training_step" else 0
        owner = next(c for c in cls.__mro__[first:] if name in vars(c))
        if owner is not theirs:
            raise ValueError(
                f"{name} of {owner.__name__} does not go with PipelineTrainer ({reason}); leave "
                "it out: override compute_loss, or use transformers' Trainer"
            )


def inherited_from(cls: type, ours: type, name: str) -> type:
    """Return the class whose method ``name`` is the next one behind ``ours``."""
    behind = cls.__mro__[cls.__mro__.index(ours) + 1 :]
    return next(c for c in behind if name in vars(c))


def check_target(target: str) -> None:
    """Refuse a target that the inherited loop cannot drive.

    Raises:
        ValueError: It is neither ``local`` nor ``poptorch``.
    """
    if target not in ("local", "poptorch"):
        raise ValueError(
            f"PipelineTrainer cannot drive target {target!r}: the inherited loop reads, logs and "
            "saves in one process; use target='local' or 'poptorch', or ipu_pipeline.train.train, "
            "which drives every target"
        )


def check_arguments(args: Any, target: str = "local") -> None:
    """Refuse arguments that the pipeline would have to ignore.

    Args:
        args: transformers' training arguments, or ours.
        target: What runs the plan.

    Raises:
        ValueError: One of them is set; the message names it and the remedy.
    """
    for name, reason in _OTHER_RUNTIMES.items():
        if getattr(args, name, None):
            raise ValueError(f"{name} does not go with PipelineTrainer ({reason}); leave it out")
    if target == "poptorch":
        _check_for_ipus(args)
    elif getattr(args, "replicas", 1) > 1:
        raise ValueError(
            f"PipelineTrainer runs one copy of the pipeline, and replicas is {args.replicas}; "
            "leave it out, or use ipu_pipeline.train.train with target='distributed'"
        )
    if args.world_size > 1:
        raise ValueError(
            f"PipelineTrainer runs all stages in one process, and {args.world_size} were started; "
            "start it without torchrun, or use ipu_pipeline.train.train with "
            "target='distributed'"
        )
    if args.device.type != "cpu":
        raise ValueError(
            f"PipelineTrainer computes on the CPU, and the arguments chose {args.device} with "
            f"n_gpu={args.n_gpu}; set use_cpu=True"
        )
    if any(part in str(args.optim) for part in _IN_BACKWARD):
        raise ValueError(
            f"optim {str(args.optim)!r} steps inside the backward pass, before the stages have "
            "summed their gradients; choose another one, such as 'adamw_torch'"
        )
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
        raise ValueError(
            "debug='underflow_overflow' watches modules that a captured model does not call; run "
            "transformers' Trainer to look for overflows"
        )
    further = set(_either(args, "checkpointing_kwargs") or {}) - _CHECKPOINTING
    if recomputes(args) and further:
        raise ValueError(
            f"activation_checkpointing_kwargs {sorted(further)} are not supported: here every "
            "block is recomputed; to choose blocks, make a plan with "
            "passes='recompute{blocks=...}' and pass it as plan="
        )


def _check_for_ipus(args: Any) -> None:
    """Refuse what IPUs do in another way, or not at all."""
    if recomputes(args):
        raise ValueError(
            "gradient_checkpointing is the other targets': what IPUs recompute is the plan's to "
            "say; leave it out, and give ipu_config=IPUConfig(recompute=True)"
        )
    if args.bf16:
        raise ValueError(
            "IPUs have no bfloat16; leave bf16 out, and call model.half() before for float16"
        )


def recomputes(args: TrainingArguments) -> bool:
    """Whether the arguments ask for activations to be computed again in the backward pass."""
    return bool(_either(args, "checkpointing"))


def switch_off_checkpointing(model: Any) -> None:
    """Switch the model's own recomputation off: the stages recompute whole blocks."""
    newer = getattr(model, "activation_checkpointing_disable", None)
    (newer or model.gradient_checkpointing_disable)()


def _either(args: TrainingArguments, name: str) -> Any:
    """Return an argument under its name of transformers 5.x, or of earlier ones."""
    newer = getattr(args, f"activation_{name}", None)
    return newer or getattr(args, f"gradient_{name}", None)


def check_plan(plan: Plan, args: TrainingArguments) -> None:
    """Refuse a plan for another number of microbatches or of copies of the pipeline.

    Raises:
        ValueError: Plan and arguments contradict each other.
    """
    for name, planned in {
        "gradient_accumulation_steps": plan.num_microbatches,
        "replicas": plan.replicas,
    }.items():
        asked = getattr(args, name, 1)
        if asked != planned:
            raise ValueError(
                f"{name} is {asked} and the plan was made for {planned}; make them equal, or have "
                "another plan made"
            )
