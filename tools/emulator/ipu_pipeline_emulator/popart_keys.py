"""The session options that the back end of SDK 3.4 knows, by the kind of their value.

Source: the public ``SessionOptions.cpp`` of graphcore/poptorch, branch sdk-release-3.4.
"""

from __future__ import annotations

from typing import Any

_NAMES = {
    "bool": """
        aliasZeroCopy auto_round_num_ipus automaticLossScalingSettings.enabled
        batchSerializationSettings.concatOnExecutionPhaseChange
        batchSerializationSettings.concatOnPipelineStageChange
        batchSerializationSettings.concatOnVirtualGraphChange broadcast_buffers
        compileEngine constantWeights decomposeGradSum delayVarUpdates
        disableGradAccumulationTensorStreams disableOptimizerStateTensorStreams dotOpNames
        enableDistributedReplicatedGraphs enableEngineCaching enableExplicitIR
        enableExplicitMainLoops enableFloatingPointChecks enableFullyConnectedPass
        enableGradientAccumulation enableInplaceAmbiguityChecking
        enableLoadAndOffloadRNGState enableMergeExchange enableNonStableSoftmax
        enableOutlining enableOutliningCopyCostPruning enablePipelining
        enablePrefetchDatastreams enableReplicatedGraphs enableSerializedMatmuls
        enableStableNorm enableStochasticRounding enableSupportedDataTypeCasting
        ensureFp32LossScaleTensor explicitRecomputation exportPoplarComputationGraph
        exportPoplarVertexGraph groupHostSync groupNormStridedChannelGrouping
        instrumentWithHardwareCycleCounter opxAliasChecking opxModifyChecking
        rearrangeAnchorsOnHost rearrangeStreamsOnHost
        replicatedCollectivesSettings.mergeAllReduceCollectives
        replicatedCollectivesSettings.prepareScheduleForMergingCollectives
        scheduleNonWeightUpdateGradientConsumersEarly separateCallOpPdfs
        separate_backward_phase serial_phases_execution strictOpVersions useHostCopyOps
        use_model
    """,
    "int": """
        accumulateOuterFragmentSettings.schedule accumulationAndReplicationReductionType
        accumulationFactor accumulation_and_replication_reduction_type autoRecomputation
        autodiffSettings.stitchStrategy
        automaticLossScalingSettings.gradientTensorTrackingMethod
        automaticLossScalingSettings.updatePeriod batchSerializationSettings.batchSchedule
        batchSerializationSettings.factor batchSerializationSettings.method
        batchSerializationSettings.transformContext compilationProgressTotal connection_type
        defaultBufferingDepth defaultPrefetchBufferingDepth device_iterations
        distributed_process_id executionPhaseSettings.phases executionPhaseSettings.stages
        execution_mode finalDotOp firstDotOp globalReplicaOffset globalReplicationFactor
        gradient_accumulation input_cgt input_group_size ipu_id ipu_version
        looseThresholdAtPeak max_repeat_logs meanAccumulationAndReplicationReductionStrategy
        mergeVarUpdate mergeVarUpdateMemThreshold numIOTiles num_distributed_processes
        output_mode output_return_period random_seed replication_factor
        subgraphCopyingStrategy swapLimitScheduler sync_pattern syntheticDataMode
        tensors_liveness transitiveClosureOptimizationThreshold virtualGraphMode
    """,
    "float": """
        automaticLossScalingSettings.binEdgeLocation
        automaticLossScalingSettings.thresholdUpperCountProportion outlineSequenceBreakCost
        outlineThreshold timeLimitScheduler
    """,
    "str": """
        cachePath customCodeletCompileFlags kahnTieBreaker logDir log_dir model_name
        partialsTypeMatMuls saveInitializersToFile serializedPoprithmsShiftGraphsDir
    """,
    "list": """
        accumulateOuterFragmentSettings.excludedVirtualGraphs convolutionOptions
        customCodelets dotChecks engineOptions gclOptions hardwareInstrumentations
        lstmOptions matmulOptions reportOptions updatableNamedBuffers
    """,
}
_KINDS = {bool: "bool", int: "int", float: "float", str: "str"}
_KINDS.update(dict.fromkeys((list, set, tuple, dict), "list"))
_SAID = {"int": "uint64", "float": "double", "str": "string", "list": "container"}


def unknown_option(options: dict[str, Any]) -> str:
    """Return what is wrong with the first option of a wrong name or kind; empty if nothing."""
    for key, value in options.items():
        kind = _KINDS.get(type(value), "")
        if key not in _NAMES.get(kind, "").split():
            return f"Unknown {_SAID.get(kind, kind or type(value).__name__)} option {key}"
        entries = value.values() if isinstance(value, dict) else ()
        if not all(isinstance(entry, (str, int)) for entry in entries):
            return f"The values of option {key} must be text or int, got {value}"
    return ""
