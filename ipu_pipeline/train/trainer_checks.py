"""What a trainer class and its arguments can ask for and a pipeline cannot do.

``REFUSED_ARGUMENTS``, ``REFUSED_VALUES`` and ``REFUSED_METHODS`` are tables: ``refusals()`` is what
documents show.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import DynamoBackend, TorchDynamoPlugin  # type: ignore[import-untyped]
from transformers import Trainer, TrainingArguments
from transformers.debug_utils import DebugOption

from ipu_pipeline.errors import CheckpointError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.train.arguments import num_processes

_EVERYWHERE = ("local", "distributed", "poptorch")
_SEVERAL = ("distributed", "poptorch")
# Arguments that may not be set: on which targets, and why.
REFUSED_ARGUMENTS: dict[str, tuple[tuple[str, ...], str]] = {
    "fsdp": (_EVERYWHERE, "it shards the model over processes, and the plan places whole blocks"),
    "deepspeed": (_EVERYWHERE, "it brings its own engine in place of the pipeline"),
    "parallelism_config": (_EVERYWHERE, "the plan is what splits the model"),
    "use_liger_kernel": (_EVERYWHERE, "its kernels need a GPU and replace forward methods, which "
                         "a capture has to see"),
    "torch_compile": (_SEVERAL, "blocks are compiled with target='local' only"),
    "auto_find_batch_size": (_SEVERAL, "each process would find a size of its own, and a program "
                             "on IPUs has one"),
    "async_save": (_EVERYWHERE, "transformers writes the checkpoints, and training waits for them"),
    "stochastic_rounding": (_EVERYWHERE, "transformers makes the optimizer; pass "
                            "optimizers=(ipu_pipeline.ops.adamw.StochasticRoundingAdamW(...), "
                            "None)"),
    "replicated_tensor_sharding": (_EVERYWHERE, "there is one copy of the pipeline"),
    "master_weights": (_EVERYWHERE, "transformers steps the optimizer; use "
                       "ipu_pipeline.train.train"),
    "fp16": (_SEVERAL, "the loop would let each process skip steps by itself: use bf16=True, or "
             "ipu_pipeline.train.train, where all skip the same ones; IPUs have no autocast: call "
             "model.half() before"),
    "bf16": (("poptorch",), "IPUs have no autocast and no bfloat16; call model.half() before for "
             "float16"),
    "gradient_checkpointing": (("poptorch",), "what IPUs recompute is the plan's to say; give "
                               "ipu_config=IPUConfig(recompute=True)"),
    "save_on_each_node": (("distributed",), "the first process writes the whole model into a "
                          "folder that all machines share"),
}  # fmt: skip
# Values of arguments that may not be chosen; the same.
REFUSED_VALUES: dict[str, tuple[tuple[str, ...], str]] = {
    "two GPUs or more": (("local",), "the stages of one process share its device"),
    "a GPU": (_SEVERAL, "processes of a trainer compute on CPUs, IPUs by themselves"),
    "optim='lomo', 'layerwise'": (_EVERYWHERE, "it steps inside the backward pass, before the "
                                  "stages have summed their gradients"),
    "debug='underflow_overflow'": (_EVERYWHERE, "it watches modules that a captured model does "
                                   "not call"),
    "torch_compile_backend, torch_compile_mode": (("local",), "blocks are compiled by inductor in "
                                                  "its default mode"),
    "loss_scaling with fp16": (("local",), "the loop scales losses by torch's GradScaler"),
}  # fmt: skip
_IN_BACKWARD = ("lomo", "layerwise")
_CHECKPOINTING = frozenset({"use_reentrant"})


# Methods that call those of the next class, without which the pipeline is never asked.
_LOOPS = ("train", "_inner_training_loop")
# Methods that may not be another class's, and why.
REFUSED_METHODS = {
    "compute_loss_context_manager": "the model runs in the stages, outside of that context",
    "autocast_smart_context_manager": "the model runs in the stages, outside of that context",
}


def check_class(cls: type, ours: type) -> None:
    """Refuse a trainer class of which something would be ignored.

    Args:
        cls: The class that is constructed.
        ours: ``PipelineMixin``.

    Raises:
        ValueError: There is no trainer behind ours, or one before it, or a method would be called
            around something else than the model.
    """
    if not issubclass(cls, Trainer):
        raise ValueError(
            f"{cls.__name__} has no trainer of transformers among its bases; write class "
            f"{cls.__name__}({ours.__name__}, Trainer)"
        )
    before = [c for c in cls.__mro__[: cls.__mro__.index(ours)] if not issubclass(c, ours)]
    for base in before:
        if issubclass(base, Trainer):
            raise ValueError(
                f"{cls.__name__} has {base.__name__} before {ours.__name__}, which then never gets "
                f"its arguments; write class {cls.__name__}({ours.__name__}, {base.__name__})"
            )
    for name, reason in REFUSED_METHODS.items():
        owner = next(c for c in cls.__mro__ if name in vars(c))
        if owner is not Trainer:
            raise ValueError(
                f"{name} of {owner.__name__} does not go with {ours.__name__} ({reason}); leave "
                "it out: override compute_loss or training_step, or use transformers' Trainer"
            )
    for name in _LOOPS:
        for owner in cls.__mro__[: cls.__mro__.index(Trainer)]:
            code = getattr(vars(owner).get(name), "__code__", None)
            if code and not {"super", name} & {*code.co_names}:
                raise ValueError(
                    f"{name} of {owner.__name__} is a loop of its own, which hands no microbatch "
                    f"to the pipeline; call super().{name}(), or use it without {ours.__name__}"
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
    for name, (targets, reason) in REFUSED_ARGUMENTS.items():
        is_set = recomputes(args) if name == "gradient_checkpointing" else getattr(args, name, None)
        if target in targets and is_set:
            where = "" if targets == _EVERYWHERE else f" on target={target!r}"
            raise ValueError(
                f"{name} does not go with PipelineTrainer{where} ({reason}); leave it out"
            )
    _check_for_stages(args, target)
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
    mode, backend = (getattr(args, f"torch_compile_{n}", None) for n in ("mode", "backend"))
    if getattr(args, "torch_compile", None) and (mode or backend not in (None, "inductor")):
        raise ValueError(
            f"torch_compile compiles blocks by inductor in its default mode here, not by {backend} "
            f"in mode {mode}; leave torch_compile_backend and torch_compile_mode out"
        )
    if args.fp16 and getattr(args, "loss_scaling", None) is not None:
        raise ValueError(
            f"loss_scaling={args.loss_scaling} does not go with fp16 in PipelineTrainer, whose "
            "loop scales losses by torch's GradScaler; leave it out"
        )
    if target == "local" and getattr(args, "replicas", 1) > 1:
        raise ValueError(
            f"with target='local' the trainer has one copy of the pipeline, and replicas is "
            f"{args.replicas}; leave it out, or use target='distributed' in stages x replicas "
            "processes (torchrun), or ipu_pipeline.train.train with a plan of replicas"
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


def check_plan(plan: Plan, args: TrainingArguments, asked: Mapping[str, Any] | None = None) -> None:
    """Refuse a plan for another number of microbatches or of copies of the pipeline.

    Args:
        plan: The plan.
        args: Training arguments.
        asked: Fields of a plan, of which those that are not ``None`` were asked for.

    Raises:
        ValueError: Plan and arguments contradict each other.
    """
    wanted = {
        "gradient_accumulation_steps": (args.gradient_accumulation_steps, plan.num_microbatches),
        "replicas": (getattr(args, "replicas", 1), plan.replicas),
    }
    wanted |= {n: (v, getattr(plan, n)) for n, v in (asked or {}).items() if v is not None}
    for name, (value, planned) in wanted.items():
        if value != planned:
            raise ValueError(
                f"{name} is {value} and the plan was made for {planned}; make them equal, or have "
                "another plan made"
            )
    if getattr(args, "auto_find_batch_size", False):
        raise ValueError(
            "auto_find_batch_size makes microbatches smaller, and the plan was made for one size; "
            "leave plan or auto_find_batch_size out"
        )


def uncompiled(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of accelerate with which it does not compile the whole model."""
    if "dynamo_plugin" in options:
        options["dynamo_plugin"] = TorchDynamoPlugin(backend=DynamoBackend.NO)
    return options


def refusals() -> str:
    """Return the tables of what is refused, in Markdown."""
    lines = ["| argument | refused on | why |", "|---|---|---|"]
    for name, (targets, reason) in [*REFUSED_ARGUMENTS.items(), *REFUSED_VALUES.items()]:
        where = "every target" if targets == _EVERYWHERE else ", ".join(targets)
        lines.append(f"| `{name}` | {where} | {reason} |")
    lines += ["", "| method of another class | why |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in REFUSED_METHODS.items()]
    return "\n".join(lines) + "\n"
