"""Compilation: one recording run of the model, then the rules of the back end."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from . import tracing
from .device import Weights, find_loss, modes
from .enums import MeanReductionStrategy, OutputMode
from .errors import backend_error, createPoptorchError
from .graph import Slot
from .optim_base import device_values
from .options import Options
from .program import Program
from .recorder import Recorder
from .rules import check_program
from .stages import ShardedExecution
from .structure import Counts, leaves, map_leaves, micro_batch, to_device
from .training import GRADIENT

_LOG = logging.getLogger("poptorch")


def bind_inputs(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Return the inputs in the form that ``forward`` names them, so that calls compare equal."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return bound.args, {key: bound.kwargs[key] for key in sorted(bound.kwargs)}


def record(
    model: nn.Module,
    options: Options,
    weights: Weights,
    inputs: Any,
    flags: list[bool],
    *,
    training: bool,
) -> Program:
    """Run the model once on the first micro-batch and check what it did.

    Raises:
        Error: Something that cannot be traced, or a rule of the back end is broken.
    """
    counts = Counts.of(options)
    strategy = options.execution_strategy
    if isinstance(strategy, ShardedExecution):
        strategy.forget_automatic()
    program = Program(training, strategy.is_pipelined, replication_factor=counts.replicas)
    recorder = Recorder(program, strategy)
    batch = micro_batch(to_device(inputs), 0, counts.divisor)
    with torch.random.fork_rng(devices=[]), modes(model, flags), weights.symbolic(recorder):
        args, kwargs = map_leaves(lambda value: _symbol(value, recorder), batch)
        with torch.set_grad_enabled(training), tracing.recording(recorder):
            outputs = model(*args, **kwargs)
        graph = program.graph
        graph.structure = outputs
        graph.outputs = [_output(value, recorder) for value in leaves(outputs)]
        if training:
            recorder.mark_custom_functions()
            loss = find_loss(recorder.losses, leaves(outputs))
            graph.loss = recorder.slot_of(loss)
            program.trained = weights.trained(loss)
        graph.finish()
    program.recomputation = _recomputation(program, options)
    check_program(program, options)
    _check_anchors(program, options)
    for name, ipus in program.ipus_of_variables().items():
        # A pipelined program was refused for this; others are only advised against it.
        if len(ipus) > 1:
            _LOG.warning("%s is used on IPUs %s: keep tied weights on one IPU", name, ipus)
    for name in program.custom_ops:
        _LOG.warning("stand-in: custom_op %s is not computed, its outputs are zeros", name)
    return program


def _symbol(value: Any, recorder: Recorder) -> Any:
    if not isinstance(value, Tensor):
        return value
    made, slot = recorder.symbol(value)
    recorder.graph.inputs.append(slot)
    return made


def _output(value: Any, recorder: Recorder) -> Any:
    if not isinstance(value, Tensor):
        return value
    slot = recorder.slot_of(value)
    if slot is None:
        raise backend_error(
            f"Expected an IPU tensor but forward() returned a tensor of the host of shape "
            f"{tuple(value.shape)}"
        )
    return Slot(slot)


def _recomputation(program: Program, options: Options) -> int:
    """Return PopART's type of recomputation; unset, it is Pipeline (3) with several IPUs."""
    several = program.pipelined and len(program.used_ipus) > 1
    default = 3 if several and program.training else 0
    return int(options._Popart.options.get("autoRecomputation", default))


def _check_anchors(program: Program, options: Options) -> None:
    known = [GRADIENT + name for name in program.trained]
    for short, (name, _, _) in options.anchored_tensors.items():
        if name not in known:
            raise createPoptorchError(
                f"The anchored tensor {short!r} is unknown: {name!r}; the stand-in anchors "
                f"gradients in training only, named {GRADIENT}<parameter>"
            )


def group_of_parameters(optimizer: Any, weights: Weights) -> dict[str, int]:
    """Return the group of every parameter, found by its address.

    Raises:
        Error: A parameter of the optimizer is not in the model, or a trainable parameter of the
            model is in no group.
    """
    name_at = weights.host_pointers()
    groups: dict[str, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        for tensor in group["params"]:
            if tensor.data_ptr() not in name_at:
                raise createPoptorchError(
                    f"Group {index} of the optimizer has a parameter of shape "
                    f"{tuple(tensor.shape)} that is not a parameter of the model"
                )
            groups[name_at[tensor.data_ptr()]] = index
    trained = zip(weights.names, weights.parameters)
    missing = [name for name, tensor in trained if tensor.requires_grad and name not in groups]
    if missing:
        raise createPoptorchError(
            f"Trainable parameters in no group of the optimizer: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; give them a group or requires_grad_(False)"
        )
    return groups


def values_of(optimizer: Any) -> dict[str, Any]:
    """Return the device's values of an optimizer, saying what upstream gets wrong."""
    values = device_values(optimizer)
    if values["optimizer_type"] == "ADAMW_NO_BIAS":
        _LOG.warning(
            "AdamW(bias_correction=False) has no effect on the device in SDK 2.5 to 3.4: the "
            "bias is corrected"
        )
    return values


def effective_options(given: Options, training: bool, optimizer: Any) -> Options:
    """Return the frozen copy that an executor works with: no Default is left in it."""
    options = given.clone()
    if options.output_mode is OutputMode.Default:
        options.outputMode(OutputMode.Final if training else OutputMode.All)
    half = getattr(optimizer, "accum_type", torch.float32) is torch.float16
    if half and not getattr(optimizer, "use_combined_accum", False):
        options.Training.setMeanAccumulationAndReplicationReductionStrategy(
            MeanReductionStrategy.Running
        )
    options._freeze()
    return options
