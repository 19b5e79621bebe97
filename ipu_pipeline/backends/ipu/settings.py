"""Everything a poptorch program needs besides the placement: one flat JSON object.

Names are those of ``ipu_config.json`` where it has one. A plan and an :class:`IPUConfig` give the
settings together: what both say must agree, and the plan says it to the letter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices.chip import chip_of
from ipu_pipeline.backends.ipu.prices.layout import (
    StageLayout,
    convolutional_layers,
    layout_of,
    make_layout,
    placement_of,
)
from ipu_pipeline.backends.ipu.prices.operations import serialization_factor
from ipu_pipeline.backends.ipu.prices.predict import Prediction, program_of
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.spread import spread_tables
from ipu_pipeline.errors import ConfigError, LoweringError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.layers_per_ipu import counted_layers
from ipu_pipeline.planner.options.vocabulary_shares import share_of

OPTIMIZERS = ("AdamW", "Adam", "LAMB", "SGD", "RMSprop")
# Fields of a configuration that the price of a plan reads, and that have a plain default.
_PRICED = (
    "device_iterations",
    "matmul_proportion",
    "num_io_tiles",
    "optimizer_state_offchip",
    "replicated_tensor_sharding",
    "recompute_checkpoint_every_layer",
    "enable_half_partials",
)


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer as poptorch is told about it.

    Attributes:
        optimizer: Class name in ``poptorch.optim``.
        learning_rate: Learning rate at the start.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        momentum: Of SGD.
        weight_decay: Decoupled for AdamW and LAMB.
        loss_scaling: Factor of the loss before the backward pass.
        max_grad_norm: Clip the norm of all gradients to this; ``None`` for no clipping.
        accum_dtype: ``float16`` or ``float32``: type of the gradient accumulators.
        first_order_momentum_dtype: Type of the first moment.
        second_order_momentum_dtype: Type of the second moment.
    """

    optimizer: str = "AdamW"
    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    loss_scaling: float = 1.0
    max_grad_norm: float | None = None
    accum_dtype: str = "float32"
    first_order_momentum_dtype: str = "float32"
    second_order_momentum_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise LoweringError(
                f"optimizer {self.optimizer!r} does not exist in poptorch; use one of "
                f"{', '.join(OPTIMIZERS)}"
            )
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(isfinite(n) and n >= 0 for n in numbers if isinstance(n, float)):
                raise LoweringError(f"{name} must be 0 or more and finite, got {value}")


@dataclass(frozen=True)
class PopTorchSettings:
    """How the program runs.

    Attributes:
        config: The IPU configuration; it agrees with the plan.
        micro_batch_size: Samples of one microbatch.
        num_stages: Forward stages.
        optimizer: The optimizer.
        half: Weights and activations in float16.
        seed: Seed of the device and of torch; ``None`` leaves it.
        inference: What evaluation does where its placement is another one; ``None``: the same.
    """

    config: IPUConfig
    micro_batch_size: int
    num_stages: int
    optimizer: OptimizerSettings = OptimizerSettings()
    half: bool = False
    seed: int | None = None
    inference: Prediction | None = None

    def inference_places(self) -> Mapping[str, tuple[int, int, int]] | None:
        """Return stage, IPU and slices of every block in evaluation; ``None``: as in training."""
        if self.inference is None:
            return None
        graph, settings = self.inference.graph, self.inference.settings
        return {
            name: (index, stage.ipu, serialization_factor(graph, graph[name], settings))
            for index, stage in enumerate(self.inference.layout.stages)
            for name in stage.blocks
        }

    def to_json(self) -> dict[str, Any]:
        """Return the flat object that ``settings.json`` holds; every value explicit."""
        config = self.config
        inference = {
            "inference_device_iterations": config.inference_device_iterations,
            "inference_replication_factor": config.replicas(inference=True),
            "inference_memory_proportions": list(config.memory_proportions(inference=True)),
            "inference_num_stages": (
                len(self.inference.layout.stages) if self.inference else self.num_stages
            ),
            "inference_ipus_per_replica": config.num_ipus(inference=True),
        }
        return {
            "micro_batch_size": self.micro_batch_size,
            "num_stages": self.num_stages,
            "ipus_per_replica": config.num_ipus(),
            "replication_factor": config.replicas(),
            "gradient_accumulation_steps": config.accumulation(),
            "device_iterations": config.device_iterations,
            "memory_proportions": list(config.memory_proportions()),
            **inference,
            "recompute": bool(config.recompute),
            "recompute_checkpoint_every_layer": config.recompute_checkpoint_every_layer,
            "num_io_tiles": config.num_io_tiles,
            "optimizer_state_offchip": config.optimizer_state_offchip,
            "replicated_tensor_sharding": config.replicated_tensor_sharding,
            "enable_half_partials": config.enable_half_partials,
            "decompose_grad_sum": bool(config.decompose_grad_sum),
            "auto_loss_scaling": config.auto_loss_scaling,
            "explicit_ir_inference": config.explicit_ir_inference,
            "output_mode": config.output_mode,
            "executable_cache_dir": config.executable_cache_dir,
            "seed": self.seed if self.seed is not None else config.seed,
            "half": self.half,
            **asdict(self.optimizer),
            "betas": list(self.optimizer.betas),
        }


def settings_for(
    plan: Plan,
    config: IPUConfig | None = None,
    *,
    optimizer: OptimizerSettings | None = None,
    half: bool = False,
    seed: int | None = None,
) -> PopTorchSettings:
    """Return the settings of ``plan``.

    Args:
        plan: A plan for IPUs.
        config: What the plan does not say (output mode, executable cache, ...); ``None`` takes
            the program that the plan was priced with, and the defaults.
        optimizer: ``None`` takes AdamW.
        half: Run in float16.
        seed: Overrides the configuration's.

    Raises:
        LoweringError: The configuration contradicts the plan.
    """
    found, told = ipu_config_of_plan(plan, config), optimizer or OptimizerSettings()
    other = evaluation_of(plan.graph, found)
    if found.enable_half_first_order_momentum:
        told = replace(told, first_order_momentum_dtype="float16")
    return PopTorchSettings(
        config=found,
        micro_batch_size=plan.micro_batch_size,
        num_stages=plan.num_stages,
        optimizer=told,
        inference=other
        and Prediction(plan.graph, *other, chip_of(plan.machine).without(other[1].num_io_tiles)),
        half=half,
        seed=seed,
    )


def evaluation_of(graph: BlockGraph, config: IPUConfig) -> tuple[StageLayout, IPUSettings] | None:
    """Return stages and program of evaluation, where the configuration places it in another way.

    Raises:
        ConfigError: The configuration's numbers do not fit the model.
    """
    others = (
        "layers_per_ipu", "ipus_per_replica", "embedding_serialization_factor",
        "projection_serialization_factor", "serialized_embedding_splits_per_ipu",
        "serialized_projection_splits_per_ipu",
    )  # fmt: skip
    given = {name: getattr(config, f"inference_{name}") for name in others}
    if all(value in (None, getattr(config, name)) for name, value in given.items()):
        return None
    settings = IPUSettings.from_config(config, training=False)
    if config.inference_layers_per_ipu is None and settings.num_ipus == config.num_ipus():
        settings = replace(settings, stage_starts=tuple((config.stage_starts or {}).items()))
    try:
        graph = spread_tables(graph, IPUSettings.from_config(config))
        if spread_tables(graph, settings) is not graph:
            raise ConfigError("training holds the table whole; give both splits, or neither")
        return make_layout(graph, settings), settings
    except ConfigError as error:
        raise ConfigError(f"inference: {error}") from error


def ipu_config_of_plan(plan: Plan, base: IPUConfig | None = None) -> IPUConfig:
    """Return the ``ipu_config.json`` of a plan: what both can say, and the rest from ``base``.

    Raises:
        LoweringError: ``base`` says something else than the plan, whose price would be another's.
    """
    program = program_of(plan)
    layout = layout_of([(s.device, s.blocks) for s in plan.stages], program.num_ipus)
    num_ipus = max(stage.device for stage in plan.stages) + 1
    home = {name: stage.device for stage in plan.stages for name in stage.blocks}
    counts = [0] * num_ipus
    for name in _counted(plan, base, home):
        counts[home[name]] += 1
    said = {
        "layers_per_ipu": tuple(counts),
        "ipus_per_replica": num_ipus,
        "replication_factor": plan.replicas,
        "gradient_accumulation_steps": plan.num_microbatches,
        **_slices(plan, base),
        **_splits(program),
        "recompute": program.recompute,
        "stage_starts": dict(placement_of(plan.graph, layout, program).stage_starts) or None,
    }
    if base is not None and base.leaves_layers_open and base.inference_layers_per_ipu is None:
        said["inference_layers_per_ipu"] = base.inference_ipus_per_replica and (-1,)
    sized = replace(program, num_ipus=num_ipus, layers_per_ipu=tuple(counts)).ipu_config()
    evaluation: dict[str, Any] = {}
    if not plan.graph.training:  # its microbatches are those of one call of the device
        evaluation = {
            "inference_device_iterations": plan.num_microbatches,
            "inference_replication_factor": plan.replicas,
            "gradient_accumulation_steps": max(
                plan.num_microbatches,
                2 * len(layout.stages) - 1,  # what PopART asks of training
            ),
        }
    if base is None:
        return replace(sized, **{**said, **evaluation})
    own = {name: getattr(sized, name) for name in _PRICED if plan.graph.training}
    if not program.recompute:  # then nothing is recomputed from what is kept
        own.pop("recompute_checkpoint_every_layer", None)
    _check_agreement(base, said, own, training=plan.graph.training)
    chosen = {n: v for n, v in own.items() if _value(base, n, num_ipus) != v}
    return replace(base, **{**said, **chosen, **evaluation})


def _counted(plan: Plan, base: IPUConfig | None, home: Mapping[str, int]) -> tuple[str, ...]:
    """Return the layers that the base configuration counts, if it left the others on IPU 0."""
    layers = convolutional_layers(plan.graph)
    if base is None:
        return tuple(layers)
    counted = counted_layers(layers, base.layers_per_ipu, base.num_ipus())
    beside = [home[name] for name in layers if name not in counted]
    return counted if not any(beside) else tuple(layers)


def _slices(plan: Plan, base: IPUConfig | None) -> dict[str, Any]:
    """Return the serialization factors; split tables are the base configuration's to say."""
    kinds = {block.name: block.kind for block in plan.blocks}
    found: dict[str, int] = {}
    for stage in plan.stages:
        for name, factor in stage.serialize.items():
            if share_of(name):  # the splits say it
                continue
            what = "embedding" if kinds[name] == "embedding" else "projection"
            found[what] = max(found.get(what, 1), factor)
    return {
        f"{what}_serialization_factor": factor
        for what, factor in found.items()
        if base is None or not getattr(base, f"serialized_{what}_splits_per_ipu")
    }


def _splits(program: IPUSettings) -> dict[str, Any]:
    """Return the slices on every IPU of the tables that are spread."""
    found: dict[str, Any] = {}
    for what in ("embedding", "projection"):
        splits = getattr(program, f"{what}_splits") or None
        found[f"serialized_{what}_splits_per_ipu"] = splits
        if splits:
            found[f"{what}_serialization_factor"] = None
    return found


def _value(config: IPUConfig, name: str, num_ipus: int) -> Any:
    """Return a field in the form in which a plan over ``num_ipus`` says it."""
    if name == "matmul_proportion":
        shares = config.memory_proportions()
        return shares * num_ipus if len(shares) == 1 else shares
    value = getattr(config, name)
    return value and config.replicas() > 1 if name == "replicated_tensor_sharding" else value


def _check_agreement(
    base: IPUConfig, said: Mapping[str, Any], own: Mapping[str, Any], *, training: bool
) -> None:
    """Refuse a configuration that says something else than the plan.

    Args:
        base: The configuration.
        said: What the plan always says.
        own: What its program does, where a configuration that leaves the default agrees.
        training: Whether the plan trains.
    """
    layers, plain = sum(said["layers_per_ipu"]), IPUConfig()
    theirs: dict[str, Any] = {}
    # A default is no wish: the numbers may have been given beside the configuration.
    if base.replicas(inference=not training) != plain.replicas():
        theirs["replication_factor"] = base.replicas(inference=not training)
    if training and base.gradient_accumulation_steps is not None:
        theirs["gradient_accumulation_steps"] = base.gradient_accumulation_steps
    if base.layers_per_ipu != (-1,):
        theirs["layers_per_ipu"] = base.resolve_layers(layers)
    if base.recompute is not None and base.num_ipus() > 1:
        theirs["recompute"] = base.recompute
    splits = [name for name in said if "_splits_" in name and getattr(base, name)]
    theirs |= {name: getattr(base, name) for name in splits}
    changed = [name for name in own if getattr(base, name) != getattr(plain, name)]
    theirs |= {name: _value(base, name, said["ipus_per_replica"]) for name in changed}
    different = [
        f"{name}: plan {planned}, configuration {value}"
        for name, value in theirs.items()
        if (planned := {**said, **own}[name]) != value
    ]
    if different:
        raise LoweringError(
            f"the IPU configuration is not that of the plan ({'; '.join(different)}); make the "
            "plan with this configuration, or change the configuration"
        )
