"""``poptorch.Options`` from settings, in the order in which the front end needs them."""

from __future__ import annotations

from typing import Any, Mapping

import torch


def make_options(settings: Mapping[str, Any], poptorch: Any, *, inference: bool = False) -> Any:
    """Return options without an execution strategy.

    Args:
        settings: The flat object of ``settings.json``.
        poptorch: The front end.
        inference: For evaluation instead of training.
    """
    options = poptorch.Options()
    prefix = "inference_" if inference else ""
    options.replicationFactor(settings[prefix + "replication_factor"])
    options.deviceIterations(settings[prefix + "device_iterations"])
    options.autoRoundNumIPUs(True)
    if settings["seed"] is not None:
        options.randomSeed(settings["seed"])
    proportions = settings["inference_memory_proportions" if inference else "memory_proportions"]
    options.setAvailableMemoryProportion(
        {f"IPU{ipu}": share for ipu, share in enumerate(proportions)}
    )
    if settings["executable_cache_dir"]:
        options.enableExecutableCaching(settings["executable_cache_dir"])
    _outputs(options, settings, poptorch, inference=inference)
    if inference:
        options.Training.gradientAccumulation(1)
    else:
        _training(options, settings, poptorch)
    _precision(options, settings, inference=inference)
    _popart(options, settings, inference=inference)
    return options


def _outputs(options: Any, settings: Mapping[str, Any], poptorch: Any, *, inference: bool) -> None:
    if inference:
        options.outputMode(poptorch.OutputMode.All)
        return
    modes = {
        "all": poptorch.OutputMode.All,
        "sum": poptorch.OutputMode.Sum,
        "final": poptorch.OutputMode.Final,
        "default": poptorch.OutputMode.Default,
    }
    options.outputMode(modes[settings["output_mode"]])


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


def _precision(options: Any, settings: Mapping[str, Any], *, inference: bool) -> None:
    options.Precision.enableStochasticRounding(settings["half"] and not inference)
    if settings["half"]:
        partials = torch.half if settings["enable_half_partials"] else torch.float
        options.Precision.setPartialsType(partials)


def _popart(options: Any, settings: Mapping[str, Any], *, inference: bool) -> None:
    """Settings that published runs on IPUs use; they change speed and memory, not results."""
    if not inference:
        # poptorch itself would take Pipeline (3) wherever there are several IPUs.
        options._Popart.set("autoRecomputation", 3 if settings["recompute"] else 0)
    options._Popart.set("disableGradAccumulationTensorStreams", True)
    options._Popart.set("outlineThreshold", 10.0)
    options._Popart.set("subgraphCopyingStrategy", 1)
    options._Popart.set("scheduleNonWeightUpdateGradientConsumersEarly", True)
    if not inference:
        options._Popart.setPatterns(
            {
                "TiedGather": True,
                "TiedGatherAccumulate": True,
                "UpdateInplacePrioritiesForIpu": True,
            }
        )
    options._Popart.set("engineOptions", {"opt.useAutoloader": "true"})
