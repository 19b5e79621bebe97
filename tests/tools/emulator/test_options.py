"""Options: types, frozen state, defaults, and what reaches the back end."""

from __future__ import annotations

import pytest
import torch

from tests.tools.emulator.toys import mlp


def test_setters_return_the_object_they_were_called_on(poptorch) -> None:
    options = poptorch.Options()
    assert options.deviceIterations(2).replicationFactor(4) is options
    assert options.Training.gradientAccumulation(8) is options.Training
    assert options.Precision.enableStochasticRounding(True) is options.Precision
    assert options._popart is options._Popart
    assert (options.device_iterations, options.replication_factor) == (2, 4)


@pytest.mark.parametrize("value", ["2", 2.0, None])
def test_values_of_another_type_are_refused(poptorch, value) -> None:
    with pytest.raises(AssertionError, match="Unexpected type"):
        poptorch.Options().deviceIterations(value)


def test_numbers_are_not_checked_for_their_range_here(poptorch) -> None:
    options = poptorch.Options().deviceIterations(True).replicationFactor(-3)
    options.setAvailableMemoryProportion({"IPU0": 7.0})
    assert options.available_memory_proportion == {0: 7.0}


def test_undeclared_attributes_are_refused(poptorch) -> None:
    options = poptorch.Options()
    with pytest.raises(AssertionError, match="gradientAccumulation is not an option"):
        options.gradientAccumulation = 4
    with pytest.raises(AttributeError, match="no private attribute _mine"):
        options._mine = 1
    with pytest.raises(AssertionError, match="Unknown option speed"):
        options.set(speed=1)
    with pytest.raises(AttributeError, match="has no option speed"):
        options.speed  # noqa: B018
    options.device_iterations = 3
    assert options.device_iterations == 3


@pytest.mark.parametrize("wrap", ["inferenceModel", "trainingModel", "DataLoader"])
def test_use_freezes_the_options(poptorch, wrap) -> None:
    options = poptorch.Options()
    if wrap == "DataLoader":
        poptorch.DataLoader(options, [1, 2])
    else:
        getattr(poptorch, wrap)(mlp(), options)
    for change in (
        lambda: options.deviceIterations(2),
        lambda: options.Training.gradientAccumulation(2),
        lambda: options._Popart.set("enablePipelining", True),
        lambda: options.TensorLocations.numIOTiles(32),
        lambda: options.outputMode(poptorch.OutputMode.All),
        lambda: options.enableExecutableCaching(None),
    ):
        with pytest.raises(AttributeError, match="Can't modify frozen Options"):
            change()
    options.clone().deviceIterations(2)


def test_default_output_mode_is_chosen_on_the_executors_copy(poptorch) -> None:
    options = poptorch.Options()
    assert poptorch.trainingModel(mlp(), options).options.output_mode is poptorch.OutputMode.Final
    assert poptorch.inferenceModel(mlp(), options).options.output_mode is poptorch.OutputMode.All
    assert options.output_mode is poptorch.OutputMode.Default


def test_output_mode_refusals(poptorch) -> None:
    for period in (None, 0):
        with pytest.raises(AssertionError, match="EveryN needs an output_return_period above 0"):
            poptorch.Options().outputMode(poptorch.OutputMode.EveryN, period)
    with pytest.raises(AssertionError, match=r"OutputMode.Default must be replaced"):
        poptorch.Options().toDict()


def test_input_replica_grouping_reads_the_replication_factor(poptorch) -> None:
    group = poptorch.CommGroupType
    poptorch.Options().replicationFactor(4).inputReplicaGrouping(2, group.Orthogonal)
    with pytest.raises(ValueError, match=r"does not take CommGroupType.All"):
        poptorch.Options().inputReplicaGrouping(1, group.All)
    with pytest.raises(ValueError, match="must divide the replication factor 1"):
        poptorch.Options().inputReplicaGrouping(2, group.Consecutive)


def test_execution_strategy_must_be_an_instance(poptorch) -> None:
    with pytest.raises(AssertionError, match="pass an instance"):
        poptorch.Options().setExecutionStrategy(poptorch.ShardedExecution)


def test_memory_proportion_keys(poptorch) -> None:
    with pytest.raises(AssertionError, match="must look like IPU0, got 'GPU0'"):
        poptorch.Options().setAvailableMemoryProportion({"GPU0": 0.2})


def test_offline_version(poptorch) -> None:
    with pytest.raises(AssertionError, match="ipu_version must be 1, 2 or 21, got 3"):
        poptorch.Options().useOfflineIpuTarget(3)
    options = poptorch.Options().useOfflineIpuTarget()
    assert options.connection_type is poptorch.ConnectionType.Never


def test_keys_of_two_groups_are_refused(poptorch) -> None:
    options = poptorch.Options().outputMode(poptorch.OutputMode.All)
    options._Popart.set("enableStochasticRounding", True)
    with pytest.raises(AssertionError, match=r"set twice.*enableStochasticRounding"):
        options.toDict()


def test_to_dict_has_plain_values(poptorch) -> None:
    options = poptorch.Options().outputMode(poptorch.OutputMode.All)
    options.setExecutionStrategy(poptorch.ShardedExecution())
    location = poptorch.TensorLocationSettings().useOnChipStorage(False)
    options.TensorLocations.setOptimizerLocation(location.useReplicatedTensorSharding(True))
    location.useOnChipStorage(True)
    found = options.toDict()
    assert found["execution_mode"] == 1
    assert found["output_mode"] == 2
    assert found["location_optimizer"] == {"onChip": 0, "useReplicatedTensorSharding": 1}
    assert found["automaticLossScalingSettings.enabled"] is False


def test_from_json_and_environment(poptorch, monkeypatch) -> None:
    text = '{"Training.gradientAccumulation": 4, "deviceIterations": 2}'
    assert poptorch.Options().from_json(text).Training.gradient_accumulation == 4
    monkeypatch.setenv("POPTORCH_DEFAULT_OPTIONS", text)
    monkeypatch.setenv("POPTORCH_CACHE_DIR", "/cache")
    monkeypatch.setenv("POPTORCH_IPU_MODEL", "1")
    options = poptorch.Options()
    assert options.device_iterations == 2
    assert options.cachePath == "/cache"
    assert options.use_model is True
    with pytest.raises(AssertionError, match="device_iterations is not a setter of Options"):
        options.from_json('{"device_iterations": 2}')


def test_load_from_file(poptorch, tmp_path) -> None:
    path = tmp_path / "options.txt"
    path.write_text("# two calls\ndeviceIterations(3)\n\nTraining.gradientAccumulation(2)\n")
    options = poptorch.Options().loadFromFile(str(path))
    assert (options.device_iterations, options.Training.gradient_accumulation) == (3, 2)
    path.write_text("deviceIterations(\n")
    with pytest.raises(poptorch.ConfigFileError, match=r"options.txt:1: .*deviceIterations"):
        poptorch.Options().loadFromFile(str(path))


def test_random_seed_seeds_torch(poptorch) -> None:
    poptorch.Options().randomSeed(7)
    first = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(first, torch.rand(3))


def test_session_setters_store(poptorch, tmp_path) -> None:
    options = poptorch.Options()
    options.autoRoundNumIPUs().syncPattern(poptorch.SyncPattern.SinglePipeline)
    options.enableExecutableCaching("a").enableSyntheticData(False).enableStableNorm(True)
    options.broadcastBuffers(False).logDir("l").modelName("m").maxRepeatLogs(1)
    options.disableModuleNamescope().updatableNamedBuffers(["b"]).showCompilationProgressBar(False)
    options.relaxOptimizerAttributesChecks().sourceLocationExcludes(["x"])
    options.appendToLocationExcludes("y").useIpuId(3).useIpuModel(True).logCycleCount(True)
    options.connectionType(poptorch.ConnectionType.OnDemand).enableProfiling(str(tmp_path))
    assert options.source_location_excludes == ["x", "y"]
    assert options._Popart.options["engineOptions"]["autoReport.directory"] == str(tmp_path)
    assert options.enableExecutableCaching(None).toDict is not None
    assert "cachePath" not in options._values
