"""The groups of options: precision, training, locations, processes, PopART."""

from __future__ import annotations

import pytest
import torch

from tests.tools.emulator.toys import batch, mlp


def test_partials_type(poptorch) -> None:
    options = poptorch.Options()
    options.Precision.setPartialsType(torch.half)
    assert options._Popart.options["convolutionOptions"] == {"partialsType": "half"}
    options.Training.setConvolutionDithering(True)
    assert "partialsType" not in options._Popart.options["convolutionOptions"]
    with pytest.raises(ValueError, match=r"partials type must be torch.float or torch.half"):
        options.Precision.setPartialsType(torch.float64)


def test_precision_flags_are_typed(poptorch) -> None:
    precision = poptorch.Options().Precision
    precision.halfFloatCasting(None).runningStatisticsAlwaysFloat(True)
    assert precision.enableFloatingPointExceptions(True).toDict()["enableFloatingPointChecks"]
    with pytest.raises(AssertionError, match=r"Unexpected type .*enableStochasticRounding"):
        precision.enableStochasticRounding(1)
    with pytest.raises(AssertionError, match=r"Unexpected type .*enableFloatingPointExceptions"):
        precision.enableFloatingPointExceptions("yes")


def test_reduction_type(poptorch) -> None:
    training = poptorch.Options().Training
    training.accumulationAndReplicationReductionType(poptorch.ReductionType.Sum)
    with pytest.raises(ValueError, match="Unsupported reduction type"):
        training.accumulationAndReplicationReductionType(poptorch.ReductionType.NoReduction)
    with pytest.raises(AssertionError, match="Unexpected type"):
        training.accumulationAndReplicationReductionType("mean")
    with pytest.raises(AssertionError, match="Unexpected type"):
        training.setConvolutionDithering(1)


@pytest.mark.parametrize("count", [31, 33, 194])
def test_io_tiles(poptorch, count) -> None:
    locations = poptorch.Options().TensorLocations
    locations.numIOTiles(64)
    with pytest.raises(AssertionError, match=f"even number between 32 and 192, got {count}"):
        locations.numIOTiles(count)


def test_locations_are_typed(poptorch) -> None:
    settings = poptorch.TensorLocationSettings
    made = settings().minElementsForOffChip(2).minElementsForReplicatedTensorSharding(8)
    made.useIOTilesToLoad().useIOTilesToStore(False).useOnChipStorage(True).useOnChipStorage(None)
    assert "onChip" not in made.toDict()
    with pytest.raises(AssertionError, match="Expected bool or None"):
        settings().useOnChipStorage(1)
    for setter in ("useReplicatedTensorSharding", "useIOTilesToLoad", "useIOTilesToStore"):
        with pytest.raises(AssertionError, match="Unexpected type"):
            getattr(settings(), setter)("no")
    for setter in ("minElementsForOffChip", "minElementsForReplicatedTensorSharding"):
        with pytest.raises(AssertionError, match="Unexpected type"):
            getattr(settings(), setter)(2.0)
    locations = poptorch.Options().TensorLocations
    locations.setActivationLocation(made).setWeightLocation(made).setAccumulatorLocation(made)
    with pytest.raises(AssertionError, match="Unexpected type"):
        locations.setWeightLocation({"onChip": 1})


def test_processes(poptorch, monkeypatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    distributed = poptorch.Options().Distributed
    assert (distributed.numProcesses, distributed.processId) == (4, 2)
    assert distributed.disable().numProcesses == 1
    assert distributed.configureProcessId(1, 3).processId == 1


def test_the_stand_in_runs_one_process(poptorch) -> None:
    options = poptorch.Options()
    options.Distributed.configureProcessId(0, 2)
    with pytest.raises(AssertionError, match="stand-in runs one process"):
        poptorch.inferenceModel(mlp(), options)(batch(2)[0])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("outlineThreshold", 10, "Unknown uint64 option outlineThreshold"),
        ("subgraphCopyingStrategy", True, "Unknown bool option subgraphCopyingStrategy"),
        ("outline", 1.0, "Unknown double option outline"),
        ("engineOptions", "fast", "Unknown string option engineOptions"),
        ("enablePipelining", [1], "Unknown container option enablePipelining"),
        ("logDir", None, "Unknown NoneType option logDir"),
        ("engineOptions", {"a": 1.5}, "values of option engineOptions must be text or int"),
    ],
)
def test_popart_kinds_are_checked_when_compiling(poptorch, key, value, message) -> None:
    options = poptorch.Options()
    options._Popart.set(key, value)
    with pytest.raises(poptorch.Error, match=message):
        poptorch.inferenceModel(mlp(), options).compile(batch(2)[0])


def test_what_optimum_graphcore_sets_compiles(poptorch) -> None:
    options = poptorch.Options().autoRoundNumIPUs(True)
    popart = options._Popart
    popart.set("disableGradAccumulationTensorStreams", True).set("outlineThreshold", 10.0)
    popart.set("accumulateOuterFragmentSettings.schedule", 3)
    popart.set("accumulateOuterFragmentSettings.excludedVirtualGraphs", ["0"])
    popart.set("subgraphCopyingStrategy", 1)
    popart.set("scheduleNonWeightUpdateGradientConsumersEarly", True)
    popart.setPatterns({"TiedGather": True, "UpdateInplacePrioritiesForIpu": True})
    popart.setEngineOptions({"opt.useAutoloader": "true"})
    executor = poptorch.trainingModel(mlp(), options)
    executor.compile(*batch(2))
    assert executor.options.toDict()["patterns"]["TiedGather"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.useOfflineIpuTarget().useIpuModel(True), "cannot be used with useIpuModel"),
        (lambda o: o.useOfflineIpuTarget().useIpuId(1), "cannot be used with useIpuId"),
        (lambda o: o.useOfflineIpuTarget().logCycleCount(True), "used with logCycleCount"),
        (lambda o: o.deviceIterations(0), "deviceIterations must be at least 1, got 0"),
        (lambda o: o.replicationFactor(-1), "replicationFactor must be at least 1, got -1"),
    ],
)
def test_options_the_back_end_refuses(poptorch, change, message) -> None:
    options = poptorch.Options()
    change(options)
    with pytest.raises(poptorch.Error, match=message):
        poptorch.inferenceModel(mlp(), options).compile(batch(2)[0])


def test_training_options_the_back_end_refuses(poptorch) -> None:
    options = poptorch.Options()
    options.Training.setAutomaticLossScaling(True)
    options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Sum)
    with pytest.raises(poptorch.Error, match=r"loss scaling needs ReductionType.Mean"):
        poptorch.trainingModel(mlp(), options).compile(*batch(2))
    options = poptorch.Options()
    options.Training.setMeanAccumulationAndReplicationReductionStrategy(
        poptorch.MeanReductionStrategy.PostAndLoss
    )
    with pytest.raises(poptorch.Error, match=r"PostAndLoss \(2\) is unknown to PopART 3.4"):
        poptorch.trainingModel(mlp(), options).compile(*batch(2))
    options = poptorch.Options().deviceIterations(3)
    options.outputMode(poptorch.OutputMode.EveryN, 2)
    with pytest.raises(poptorch.Error, match=r"multiple of the output return period \(2\)"):
        poptorch.inferenceModel(mlp(), options).compile(batch(6)[0])
