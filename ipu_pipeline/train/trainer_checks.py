"""What transformers' training arguments can ask for and a pipeline cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.debug_utils import DebugOption

from ipu_pipeline.errors import CheckpointError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.train.arguments import num_processes

_OTHER_RUNTIMES = {
    "fsdp": "it shards the model over processes, and the plan places whole blocks",
    "deepspeed": "it brings its own engine in place of the pipeline",
    "parallelism_config": "the plan is what splits the model",
    "torch_compile": "stages run the model's own modules",
    "use_liger_kernel": "its kernels need a GPU",
    "auto_find_batch_size": "a plan is made for one size of microbatch",
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


def chosen_target(target: str | None) -> str:
    """Return the target that a trainer drives in this process.

    Raises:
        ValueError: There is no such target; or several processes were started, and each would
            train the whole job.
    """
    several = num_processes() > 1
    chosen = target or ("distributed" if several else "local")
    if chosen not in ("local", "poptorch", "distributed"):
        raise ValueError(
            f"PipelineTrainer cannot drive target {target!r}; use target='local', 'distributed' "
            "or 'poptorch'"
        )
    if several and chosen != "distributed":
        raise ValueError(
            f"{num_processes()} processes were started, and with target={chosen!r} each of them "
            "would train the whole job into one folder; start the script without torchrun, or use "
            "target='distributed', where each process runs its own stages"
        )
    return chosen


def check_folder(path: Path) -> None:
    """Refuse a checkpoint that this process does not see.

    Raises:
        CheckpointError: It is not there.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not there; let output_dir be in a file system that all machines share"
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
    else:
        _check_for_stages(args, target)
    if target == "distributed" and getattr(args, "save_on_each_node", False):
        raise ValueError(
            "save_on_each_node does not go with target='distributed': the first process writes "
            "the whole model; leave it out, and let output_dir be in a file system that all "
            "machines share"
        )
    if args.device.type != "cpu" and (target != "local" or args.n_gpu > 1):
        raise ValueError(
            "PipelineTrainer runs on CPUs, with target='local' also on one GPU, and the arguments "
            f"chose {args.device} with n_gpu={args.n_gpu}; set use_cpu=True, or let it see one GPU "
            "(CUDA_VISIBLE_DEVICES=0)"
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


def _check_for_stages(args: Any, target: str) -> None:
    """Refuse what stages do in another way, or not at all."""
    if args.fp16 and target == "distributed":
        raise ValueError(
            "fp16 does not go with target='distributed' in PipelineTrainer, whose loop lets each "
            "process skip steps by itself; use bf16=True, or ipu_pipeline.train.train, where all "
            "processes skip the same steps"
        )
    if args.fp16 and getattr(args, "loss_scaling", None) is not None:
        raise ValueError(
            f"loss_scaling={args.loss_scaling} does not go with fp16 in PipelineTrainer, whose "
            "loop scales losses by torch's GradScaler; leave it out"
        )
    if target == "local" and getattr(args, "replicas", 1) > 1:
        raise ValueError(
            f"with target='local' there is one copy of the pipeline, and replicas is "
            f"{args.replicas}; leave it out, or use target='distributed' in stages x replicas "
            "processes (torchrun)"
        )


def _check_for_ipus(args: Any) -> None:
    """Refuse what IPUs do in another way, or not at all."""
    if recomputes(args):
        raise ValueError(
            "gradient_checkpointing is the other targets': what IPUs recompute is the plan's to "
            "say; leave it out, and give ipu_config=IPUConfig(recompute=True)"
        )
    if args.bf16 or args.fp16:
        raise ValueError(
            "IPUs have no autocast and no bfloat16; leave bf16 and fp16 out, and call model.half() "
            "before for float16"
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
