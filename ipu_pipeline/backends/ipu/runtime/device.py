"""What the device is given besides the placement (options, optimizer, rows), and its loss."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn

from .host_values import map_leaves

_OVERLAP_MEMORY_OPTIMIZED = 3  # popart.AccumulateOuterFragmentSchedule
_TYPES = {"float16": torch.float16, "float32": torch.float32}


def make_options(settings: Mapping[str, Any], poptorch: Any, *, inference: bool = False) -> Any:
    """Return options without an execution strategy.

    Args:
        settings: The flat object of ``settings.json``.
        poptorch: The front end.
        inference: For evaluation instead of training.
    """
    prefix = "inference_" if inference else ""
    popdist = started_by_poprun()
    if popdist is None:
        options = poptorch.Options()
        options.replicationFactor(settings[prefix + "replication_factor"])
    else:  # it knows this process, its replicas and its IPUs
        options = popdist.poptorch.Options(ipus_per_replica=settings[prefix + "ipus_per_replica"])
    options.deviceIterations(settings[prefix + "device_iterations"])
    options.autoRoundNumIPUs(True)
    if settings["num_io_tiles"]:
        options.TensorLocations.numIOTiles(settings["num_io_tiles"])
    if settings["seed"] is not None:
        options.randomSeed(settings["seed"])
    proportions = settings["inference_memory_proportions" if inference else "memory_proportions"]
    options.setAvailableMemoryProportion(
        {f"IPU{ipu}": share for ipu, share in enumerate(proportions)}
    )
    if settings["executable_cache_dir"] not in ("", "disabled"):
        options.enableExecutableCaching(settings["executable_cache_dir"])
    mode = "all" if inference else settings["output_mode"]
    options.outputMode(getattr(poptorch.OutputMode, mode.capitalize()))
    if inference:
        options.Training.gradientAccumulation(1)
    else:
        _training(options, settings, poptorch)
    options.Precision.enableStochasticRounding(settings["half"] and not inference)
    if settings["half"]:
        partials = torch.half if settings["enable_half_partials"] else torch.float
        options.Precision.setPartialsType(partials)
    _popart(options, settings, inference=inference)
    return options


def load_ahead(inputs: Any, settings: Mapping[str, Any], poptorch: Any, *, training: bool) -> Any:
    """Return inputs of a program that I/O tiles, if there are any, load while others compute."""
    if not settings["num_io_tiles"]:
        return inputs
    mode = poptorch.OverlapMode.OverlapDeviceIterationLoop
    if training and settings["gradient_accumulation_steps"] > 1:
        mode = poptorch.OverlapMode.OverlapAccumulationLoop

    def told(value: Any) -> Any:
        return poptorch.set_overlap_for_input(value, mode) if isinstance(value, Tensor) else value

    return map_leaves(told, inputs)


def started_by_poprun() -> Any:
    """Return ``popdist`` where poprun started this process, one of several; else ``None``."""
    if importlib.util.find_spec("popdist") is None:
        return None
    popdist = importlib.import_module("popdist")
    if not popdist.isPopdistEnvSet():
        return None
    importlib.import_module("popdist.poptorch")
    return popdist


def _training(options: Any, settings: Mapping[str, Any], poptorch: Any) -> None:
    training = options.Training
    training.gradientAccumulation(settings["gradient_accumulation_steps"])
    training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
    if settings["auto_loss_scaling"]:
        training.setAutomaticLossScaling(True)
    state = poptorch.TensorLocationSettings()
    state.useOnChipStorage(not settings["optimizer_state_offchip"])
    state.useReplicatedTensorSharding(
        settings["replicated_tensor_sharding"] and settings["replication_factor"] > 1
    )
    options.TensorLocations.setOptimizerLocation(state)


def _popart(options: Any, settings: Mapping[str, Any], *, inference: bool) -> None:
    """Settings that published runs on IPUs use; they change speed and memory, not results."""
    popart = options._Popart
    if inference:
        if settings["explicit_ir_inference"]:
            popart.set("enableExplicitIR", True)
    else:
        # poptorch itself would take Pipeline (3) wherever there are several IPUs.
        popart.set("autoRecomputation", 3 if settings["recompute"] else 0)
        patterns = ("TiedGather", "TiedGatherAccumulate", "UpdateInplacePrioritiesForIpu")
        popart.setPatterns(dict.fromkeys(patterns, True))
        if settings["decompose_grad_sum"]:
            popart.set("decomposeGradSum", True)
        if settings["max_grad_norm"] is None:  # clipping has an order of its own
            popart.set("accumulateOuterFragmentSettings.schedule", _OVERLAP_MEMORY_OPTIMIZED)
            popart.set("accumulateOuterFragmentSettings.excludedVirtualGraphs", ["0"])
    popart.set("disableGradAccumulationTensorStreams", True)
    popart.set("outlineThreshold", 10.0)
    popart.set("subgraphCopyingStrategy", 1)
    popart.set("scheduleNonWeightUpdateGradientConsumersEarly", True)
    engine = {"opt.useAutoloader": "true", "target.syncReplicasIndependently": "true"}
    popart.set("engineOptions", engine)


def make_optimizer(
    settings: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], poptorch: Any
) -> Any:
    """Return an optimizer of ``poptorch.optim``.

    Args:
        settings: The flat object of ``settings.json``.
        groups: Parameter groups, each with ``params`` and its ``weight_decay`` (and ``lr``).
        poptorch: The front end.
    """
    name = settings["optimizer"]
    arguments = {
        "lr": settings["learning_rate"],
        "weight_decay": settings["weight_decay"],
        "loss_scaling": settings["loss_scaling"],
        "accum_type": _TYPES[settings["accum_dtype"]],
    }
    if name == "SGD":
        arguments.update(momentum=settings["momentum"], use_combined_accum=False)
    else:
        arguments.update(
            first_order_momentum_accum_type=_TYPES[settings["first_order_momentum_dtype"]],
            second_order_momentum_accum_type=_TYPES[settings["second_order_momentum_dtype"]],
            eps=settings["eps"],
        )
    if name in ("Adam", "AdamW", "LAMB"):
        arguments["betas"] = tuple(settings["betas"])
    if name in ("SGD", "Adam", "AdamW") and settings["max_grad_norm"] is not None:
        arguments["max_grad_norm"] = settings["max_grad_norm"]
    return getattr(poptorch.optim, name)(groups, **arguments)


def decayed_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups as transformers makes them: biases and norms are not decayed."""
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bias = name.rsplit(".", 1)[-1] == "bias"
            (plain if bias or id(parameter) in norms else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def read_data(path: str, call_size: int) -> dict[str, Tensor]:
    """Read a ``torch.save``d dict of tensors whose axis 0 are the rows.

    Raises:
        ValueError: It is no such dict, or holds fewer rows than one call of the device takes.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is none makes torch raise
        said = "it is damaged, or holds more than tensors"  # torch says how to run what it holds
        if isinstance(error, OSError):
            said = str(error)[:300]
        raise ValueError(f"{path} is no file of tensors by torch.save: {said}") from error
    if not isinstance(data, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.ndim
        for name, value in data.items()
    ):
        raise ValueError(f"{path} must hold a dict of tensors by the model's input names")
    rows = {name: len(value) for name, value in data.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(f"{path}: the tensors have different numbers of rows: {rows}")
    if next(iter(rows.values())) < call_size:
        raise ValueError(
            f"{path} has {next(iter(rows.values()))} rows, one call of the device takes "
            f"{call_size} = micro batch x accumulation x replicas x iterations; give more rows"
        )
    return data


def synthetic_data(inputs: Sequence[Mapping[str, Any]], rows: int, seed: int) -> dict[str, Tensor]:
    """Return random rows in the shapes of the plan: zeros and ones, or normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    data = {}
    for spec in inputs:
        shape = (rows, *spec["shape"][1:])
        dtype = getattr(torch, spec["dtype"])
        if dtype.is_floating_point:
            data[spec["name"]] = torch.randn(shape, generator=generator).to(dtype)
        else:
            data[spec["name"]] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return data


def mean_loss(losses: Tensor, settings: Mapping[str, Any]) -> float:
    """Return one number for the losses of one call: the mean of what the device gave back.

    That is the mean over all microbatches under the output modes ``all`` and ``sum``, and over the
    last microbatch of every replica under ``final`` and ``default``.
    """
    mean = float(losses.float().mean())
    if settings["output_mode"] == "sum":
        mean /= settings["gradient_accumulation_steps"] * settings["device_iterations"]
    return mean
