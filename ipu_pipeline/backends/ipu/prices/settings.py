"""What a prediction needs to know besides the graph: one run's numbers, all of them explicit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.config.ipu_config import Copies, Factor, IPUs, Share, Steps, Tiles
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.codec import Amount, Count, from_json, to_json

Precision = Literal["16.16", "16.32", "32.32"]
FrontEnd = Literal["popart", "poptorch"]
PRECISIONS: tuple[str, ...] = ("16.16", "16.32", "32.32")


@dataclass(frozen=True)
class IPUSettings:
    """One run of one model on IPUs.

    Attributes:
        num_ipus: IPUs of one replica.
        layers_per_ipu: Layers of each IPU; -1 shares the rest evenly; empty with ``placement``.
        embedding_ipu: IPU of the blocks before the first layer.
        head_ipu: IPU of head and loss; ``None``: with a tied embedding, else on the last IPU.
        replicas: Copies of the pipeline.
        accumulation: Microbatches per optimizer step of one replica (1 in inference).
        device_iterations: Optimizer steps (in inference: microbatches) per return to the host.
        proportions: ``availableMemoryProportion`` of every IPU: share of a tile's memory that the
            operands of one matrix product may take while it runs.
        embedding_factor: Slices of the embedding lookup, at least 1.
        projection_factor: Slices of the output projection, at least 1.
        embedding_splits: Slices of the embedding table that each IPU holds; empty: all of it
            where the lookup is.
        projection_splits: The same for the output projection.
        num_io_tiles: Tiles that only load the next inputs while the others compute; ``None``: none.
        optimizer: Its published name; ``sgd`` has no state, every other has two moments.
        optimizer_offchip: Optimizer state in streaming memory.
        sharded: Replicated tensor sharding of the optimizer state.
        half_first_moment: First moment in float16.
        recompute: Every stage but the last runs its forward pass again in its backward stage
            (PopART's pipeline recomputation, of the whole program or of nothing).
        checkpoint_layers: Keep every layer's input, so that one layer at a time is recomputed.
        checkpoint_bytes: Bytes per element of kept inputs; 0: as the compute type.
        precision: Type of operands and of partial sums, in bits.
        front_end: Library that built the program.
        training: Whether there is a backward pass.
        pipelined: Whether stages run as a pipeline (else one after another).
        hoisted: Later embeddings are computed in the stage of the first one, as the published
            library does; else wherever the model's forward pass comes to them.
        block_slices: Slices by block, 1 for those that it does not name; ``None``: by the two
            factors.
        stage_starts: First block and IPU of every stage, instead of ``layers_per_ipu``; empty:
            not given.
    """

    num_ipus: IPUs
    layers_per_ipu: tuple[int, ...] = (-1,)
    embedding_ipu: Count = 0
    head_ipu: Count | None = None
    replicas: Copies = 1
    accumulation: Steps = 1
    device_iterations: Steps = 1
    proportions: tuple[Share, ...] = ()
    embedding_factor: Factor = 1
    projection_factor: Factor = 1
    embedding_splits: tuple[Factor, ...] = ()
    projection_splits: tuple[Factor, ...] = ()
    num_io_tiles: Tiles | None = None
    optimizer: str = "adamw"
    optimizer_offchip: bool = False
    sharded: bool = False
    half_first_moment: bool = False
    recompute: bool = True
    checkpoint_layers: bool = True
    checkpoint_bytes: Amount = 0
    precision: str = "16.16"
    front_end: FrontEnd = "poptorch"
    training: bool = True
    pipelined: bool = True
    hoisted: bool = False
    block_slices: tuple[tuple[str, Factor], ...] | None = None
    stage_starts: tuple[tuple[str, Count], ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is unknown; use one of {PRECISIONS}")
        counts = (self.num_ipus, self.replicas, self.accumulation, self.device_iterations)
        if min(*counts, self.embedding_factor, self.projection_factor) < 1:
            raise ValueError(
                "num_ipus, replicas, accumulation, device_iterations and serialization factors "
                f"must be at least 1, got {counts}, {self.embedding_factor} and "
                f"{self.projection_factor}"
            )

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation on the device."""
        return 4 if self.precision == "32.32" else 2

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step of one replica (in inference: of a call)."""
        return self.accumulation if self.training else self.device_iterations

    @property
    def exposed_inputs(self) -> float:
        """Share of the microbatches whose input nothing hides: the first and the last of a loop."""
        loop = self.num_microbatches if self.num_microbatches > 1 else self.device_iterations
        return min(1.0, 2 / loop) if self.num_io_tiles else 1.0

    @property
    def stashed_bytes(self) -> float:
        """Bytes of one element of a kept stage or layer input."""
        return self.checkpoint_bytes or self.element_bytes

    @property
    def state_bytes(self) -> float:
        """Bytes of optimizer state per parameter, before sharding (moments are float32)."""
        if "sgd" in self.optimizer.lower():
            return 0.0
        return 6.0 if self.half_first_moment else 8.0

    @property
    def chip_state_bytes(self) -> float:
        """Bytes of optimizer state per parameter that are on the chip all the time."""
        return 0.0 if self.optimizer_offchip else self.state_bytes * self.state_share

    @property
    def state_share(self) -> float:
        """Share of the optimizer state that one replica holds and updates."""
        return 1.0 / self.replicas if self.sharded else 1.0

    def proportion(self, ipu: int) -> float:
        """Memory proportion of ``ipu``; PopART's default of 0.6 where none was given."""
        return self.proportions[ipu] if ipu < len(self.proportions) else 0.6

    @property
    def recomputation(self) -> str:
        """What the device recomputes, which is what an emitted program tells it."""
        if self.num_ipus == 1 or not self.training:
            return "nothing is recomputed"
        if not self.recompute:
            return "recomputation is off"
        kept = "layers'" if self.checkpoint_layers else "stages'"
        return f"every stage but the last is recomputed from {kept} inputs"

    def program_text(self) -> str:
        """Say what the program does besides its placement."""
        place = "off chip" if self.optimizer_offchip else "on chip"
        given = ", ".join(f"{value:g}" for value in dict.fromkeys(self.proportions)) or "0.6"
        return (
            f"program: {self.recomputation}, {self.precision} arithmetic, optimizer state {place}"
            f"{', sharded' if self.sharded else ''}, memory proportion {given}"
            f"{f', {self.num_io_tiles} I/O tiles' if self.num_io_tiles else ''}"
        )

    @classmethod
    def from_config(
        cls,
        config: IPUConfig,
        *,
        replicas: int | None = None,
        training: bool = True,
    ) -> IPUSettings:
        """Read an ``ipu_config.json``.

        Args:
            config: The configuration, with ``replication_factor`` already a number or with a
                ``default`` entry.
            replicas: Overrides the configuration's.
            training: Whether to predict training or inference.

        Raises:
            ConfigError: The configuration's numbers contradict each other.
        """
        inference = not training
        prefix = "inference_" if inference else ""
        num_ipus = config.num_ipus(inference=inference)
        splits = {
            name: getattr(config, f"{prefix}serialized_{name}_splits_per_ipu") or ()
            for name in ("embedding", "projection")
        }
        factors = {
            name: getattr(config, f"{prefix}{name}_serialization_factor") or sum(splits[name])
            for name in splits
        }
        starts = None if inference else config.stage_starts
        return cls(
            num_ipus=num_ipus,
            layers_per_ipu=config.layers(inference=inference),
            replicas=replicas or config.replicas(inference=inference),
            accumulation=1 if inference else config.accumulation(),
            device_iterations=(
                config.inference_device_iterations if inference else config.device_iterations
            ),
            proportions=config.memory_proportions(inference=inference),
            embedding_factor=max(1, factors["embedding"] or 1),
            projection_factor=max(1, factors["projection"] or factors["embedding"] or 1),
            embedding_splits=tuple(splits["embedding"]),
            projection_splits=tuple(splits["projection"]),
            num_io_tiles=config.num_io_tiles,
            optimizer_offchip=config.optimizer_state_offchip,
            sharded=config.replicated_tensor_sharding,
            half_first_moment=bool(config.enable_half_first_order_momentum),
            recompute=config.recompute is not False,
            checkpoint_layers=config.recompute_checkpoint_every_layer,
            precision="16.16" if config.enable_half_partials else "16.32",
            training=training,
            pipelined=num_ipus > 1,
            stage_starts=tuple((starts or {}).items()),
        )

    def ipu_config(self) -> IPUConfig:
        """Return these settings as ``ipu_config.json`` holds them; everything is explicit."""
        given: dict[str, Any] = {
            "layers_per_ipu": self.layers_per_ipu,
            "ipus_per_replica": self.num_ipus,
            "replication_factor": self.replicas,
            "gradient_accumulation_steps": self.accumulation,
            "device_iterations": self.device_iterations,
            "matmul_proportion": tuple(self.proportion(ipu) for ipu in range(self.num_ipus)),
            "embedding_serialization_factor": self.embedding_factor,
            "projection_serialization_factor": self.projection_factor,
            "num_io_tiles": self.num_io_tiles,
            "optimizer_state_offchip": self.optimizer_offchip,
            "replicated_tensor_sharding": self.sharded,
            "recompute": self.recompute,
            "recompute_checkpoint_every_layer": self.checkpoint_layers,
            "enable_half_partials": self.precision == "16.16",
            "enable_half_first_order_momentum": True if self.half_first_moment else None,
            "stage_starts": dict(self.stage_starts) or None,
        }
        for what in ("embedding", "projection"):
            splits = getattr(self, f"{what}_splits")
            if splits:
                given[f"serialized_{what}_splits_per_ipu"] = splits
                given[f"{what}_serialization_factor"] = None
        return IPUConfig(**given)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; :meth:`from_json` reads it back."""
        found: dict[str, Any] = to_json(self)
        return found

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> IPUSettings:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: A field is unknown or has a wrong value.
        """
        return from_json(cls, raw, "the settings of an IPU program", PlanError)
