"""How many ranks share what of a model, and how a rank's program runs its operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ipu_pipeline.errors import LoweringError, PlanError
from ipu_pipeline.ir.codec import from_json
from ipu_pipeline.ir.limits import check_count, count_of

if TYPE_CHECKING:
    from ipu_pipeline.ir.graph import BlockGraph
    from ipu_pipeline.ir.machine import Machine
    from ipu_pipeline.ir.plan import Plan

PARTS = ("core_attn", "mlp", "moe_act", "layernorm", "mla_up_proj")
PRECISIONS = ("bfloat16", "float16", "float32", "float8", "float4")
# Bytes of one element of moments; a float32 copy of a weight in 16 bits comes on top.
OPTIMIZERS = {"adamw": 8, "adam": 8, "momentum": 4, "sgd": 0}
_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """How many ranks share what. Their product without ``ep`` and ``vpp`` is the number of GPUs.

    Attributes:
        dp: Data parallel copies.
        tp: Ranks that share every product, with sequence parallelism between products.
        pp: Ranks of a pipeline.
        cp: Ranks that share the tokens of a sequence.
        ep: Ranks that share the experts; they are among the ``dp * cp * tp``.
        vpp: Stages of a rank.
        zero_stage: 0: every rank holds all optimizer state of its stage; 1: sharded over
            ``dp * cp``; 2: gradients, too; 3: weights, too.
        micro_batch: Samples of a microbatch.
        recompute: ``full`` for whole layers, or parts: ``core_attn``, ``mlp``, ``moe_act``,
            ``layernorm``, ``mla_up_proj``.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    vpp: int = 1
    zero_stage: int = 0
    micro_batch: int = 1
    recompute: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "cp", "ep", "vpp", "micro_batch"):
            limit = name if name == "micro_batch" else "num_devices"
            check_count(name, getattr(self, name), limit)
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if (self.dp * self.cp * self.tp) % self.ep:
            raise ValueError(
                f"ep {self.ep} does not divide the {count_of(self.dp * self.cp * self.tp, 'rank')} "
                f"of a stage (dp {self.dp} x cp {self.cp} x tp {self.tp}); use a divisor"
            )

    @property
    def num_devices(self) -> int:
        """GPUs of the whole job."""
        return self.dp * self.tp * self.pp * self.cp


@dataclass(frozen=True, kw_only=True)
class RankEngine:
    """How a program runs the operations of a block.

    Attributes:
        fused: Operations between products run as one pass (``fused.py``).
        fused_loss: Cross entropy is one kernel over the logits in 16 bits, in place.
        precision: dtype of the layers' products: that of the model, ``float8`` or ``float4``.
        gradient_bytes: Of one element of an accumulated gradient.
        dropout: Masks are kept, one byte an element, for each of two outputs of a layer.
        tensor_overlap: Share of tensor parallel collectives that runs beside products.
        expert_overlap: The same of the experts' all-to-all.
        pipeline_overlap: The same of copies between stages, where a rank has several.
        weight_bytes: Of one element of a weight that products read.
        state_bytes: Of one element of the optimizer's state, a float32 copy of it included.
        ours: These are this project's own processes. Neighbours are ranks of one pipeline, not
            those that share a stage; ranks of tensor parallelism have a slice of every expert; what
            recomputes or runs in slices does not split its backward pass; the update takes all
            gradients of a rank in float32 at one time.
    """

    fused: bool = False
    fused_loss: bool = False
    precision: str = ""
    gradient_bytes: int = 4
    dropout: bool = False
    tensor_overlap: float = 0.0
    expert_overlap: float = 0.0
    pipeline_overlap: float = 0.0
    ours: bool = False
    weight_bytes: int = 2
    state_bytes: int = 12

    @property
    def update_bytes(self) -> int:
        """Bytes that an update moves per element: all is read, all but gradients written."""
        own = self.state_bytes + (self.weight_bytes if self.weight_bytes == _FLOAT_BYTES else 0)
        return 2 * own + _FLOAT_BYTES


EAGER = RankEngine()

# Megatron-Core with Transformer Engine: half of the collectives runs beside other kernels.
MEGATRON = RankEngine(fused=True, tensor_overlap=0.5, expert_overlap=0.5, pipeline_overlap=0.5)
# ``torch`` runs torch's operations one by one.
ENGINES = {"torch": RankEngine(ours=True), "megatron": MEGATRON}


@dataclass(frozen=True, kw_only=True)
class GpuSettings:
    """What a plan on GPUs keeps in ``settings``: all that its other fields do not say.

    Attributes:
        tp: As in :class:`ParallelSizes`.
        cp: The same.
        ep: The same.
        zero_stage: The same.
        recompute: Parts of every layer; whole layers are in the plan's stages.
        precision: Of the products; ``float8`` and ``float4`` are those of the layers. Empty: the
            dtype of the captured model, which the others must be.
        optimizer: Whose state is kept: one of ``OPTIMIZERS``.
        engine: Whose program it is: ``torch`` (ours) or ``megatron``.
        fused_loss: As in :class:`RankEngine`.
        gradient_bytes: The same; ``None``: of engine ``torch`` as many as of a weight, else 4.
        dropout: The same.
        tied: As in :class:`~ipu_pipeline.planner.search.Constraints`.
        update_s: The same.
    """

    tp: int = 1
    cp: int = 1
    ep: int = 1
    zero_stage: int = 0
    recompute: tuple[str, ...] = ()
    precision: Literal["", "bfloat16", "float16", "float32", "float8", "float4"] = ""
    optimizer: Literal["adamw", "adam", "momentum", "sgd"] = "adamw"
    engine: Literal["torch", "megatron"] = "torch"
    fused_loss: bool = False
    gradient_bytes: int | None = None
    dropout: bool = False
    tied: str = "free"
    update_s: Mapping[str, float] = field(default_factory=dict, hash=False)

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> GpuSettings:
        """Return checked settings.

        Raises:
            PlanError: A setting is unknown, of a wrong type or out of range.
        """
        found = from_json(cls, raw, "the plan's settings", PlanError)
        wrong = [name for name in found.recompute if name not in PARTS]
        if wrong:
            raise PlanError(
                f"the plan's settings recompute {wrong[0]!r}; use {', '.join(PARTS)}, and the "
                "stages' own recompute for whole layers"
            )
        if found.gradient_bytes not in (None, 2, 4):
            raise PlanError(f"gradient_bytes must be 2 or 4, got {found.gradient_bytes}")
        found.sizes()
        return found

    def sizes(self, **more: Any) -> ParallelSizes:
        """Return the parallel sizes, with those that other fields of a plan say.

        Raises:
            PlanError: One is out of range, or does not divide.
        """
        own = {name: getattr(self, name) for name in ("tp", "cp", "zero_stage", "recompute")}
        try:
            sizes = ParallelSizes(**own, **more)
            return replace(sizes, ep=self.ep) if more else sizes
        except ValueError as error:
            raise PlanError(f"the plan's settings: {error}") from error

    def rank_engine(self, graph: BlockGraph, machine: Machine) -> RankEngine:
        """Return how operations run, and what an element of the state takes.

        Raises:
            PlanError: The precision is not that of the captured model, or the devices have none.
        """
        peaks = machine.devices[0].flops_per_s
        if self.precision in ("float8", "float4") and self.precision not in peaks:
            known = ", ".join(name for name in PRECISIONS if name in peaks)
            raise PlanError(
                f"the plan's settings ask for precision {self.precision}, in which the devices of "
                f"{machine.name} do not multiply; use {known}"
            )
        captured = dtype_of(graph)
        plain, wanted = captured == "float32", self.precision
        if wanted and wanted != captured and (plain or wanted in ("float32", "float16")):
            raise PlanError(
                f"the plan's settings ask for precision {wanted}, but the model was captured in "
                f"{captured}; make the plan again with --precision {wanted}"
            )
        own_bytes = 2 if self.engine == "torch" and not plain else _FLOAT_BYTES
        return replace(
            ENGINES[self.engine],
            precision=self.precision if self.precision in ("float8", "float4") else "",
            fused_loss=self.fused_loss,
            gradient_bytes=self.gradient_bytes or own_bytes,
            dropout=self.dropout,
            weight_bytes=_FLOAT_BYTES if plain else 2,
            state_bytes=OPTIMIZERS[self.optimizer] + (0 if plain else _FLOAT_BYTES),
        )


def parts_named(text: str) -> tuple[str, ...]:
    """Return parts of layers that are separated by commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def dtype_of(graph: BlockGraph) -> str:
    """Return the dtype that most elements of the weights have."""
    counts: dict[str, int] = {}
    for spec in graph.parameters:
        counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.numel
    return max(counts, key=lambda name: counts[name], default="float32")


def sizes_of(plan: Plan) -> ParallelSizes:
    """Return the parallel sizes of a plan on GPUs.

    Raises:
        PlanError: A setting is wrong, or the machine has fewer devices.
    """
    settings = GpuSettings.read(plan.settings)
    pp = len({stage.device for stage in plan.stages})
    sizes = settings.sizes(
        dp=plan.replicas, pp=pp, vpp=max(1, plan.num_stages // pp),
        micro_batch=max(1, plan.micro_batch_size),
    )  # fmt: skip
    have = len(plan.machine.devices)
    if sizes.num_devices > have:
        raise PlanError(
            f"{count_of(plan.replicas, 'replica')} x {count_of(pp, 'rank')} of a pipeline x tp "
            f"{sizes.tp} x cp {sizes.cp} need {count_of(sizes.num_devices, 'device')}, "
            f"{plan.machine.name} has {have}; lower one of them"
        )
    return sizes


def refuse_sizes(raw: Mapping[str, Any], machine: Machine) -> None:
    """Refuse settings of GPUs where they have no price: other machines, inference, measured costs.

    Raises:
        PlanError: A size is above one.
    """
    settings = GpuSettings.read(raw)
    named = _shared_by(settings)
    if named:
        raise PlanError(
            f"{', '.join(named)}: parallel sizes besides stages and replicas are priced for "
            f"training on GPUs with known kernels; {machine.name} is priced here without them: "
            "leave them out"
        )


def tensor_parallel_size(plan: Plan) -> int:
    """Return how many of this project's own processes share the products of a stage.

    Raises:
        LoweringError: They cannot run the plan: they would share tokens or experts, or gradients
            or weights; or the plan is not for GPUs, and nothing reads its settings of GPUs.
    """
    if plan.machine.devices[0].kernels is None:
        for name in ("tp", "cp", "ep", "zero_stage"):
            if plan.settings.get(name, default := getattr(GpuSettings(), name)) != default:
                raise LoweringError(
                    f"the plan's settings have {name} {plan.settings[name]}, which is for GPUs "
                    f"with known kernels, such as h100-x64, and {plan.machine.name} has none; "
                    "leave it out, or plan with another machine"
                )
        return 1
    settings = GpuSettings.read(plan.settings)
    named = _shared_by(replace(settings, tp=1))
    if settings.recompute:
        named.append(f"recompute {', '.join(settings.recompute)}")
    if named:
        raise LoweringError(
            f"the plan has {', '.join(named)}, which this project's processes do not run yet; "
            "write it for another engine (ipu-pipeline export), or plan with stages, replicas and "
            "--tp only"
        )
    return settings.tp


def _shared_by(settings: GpuSettings) -> list[str]:
    sizes = ("tp", "cp", "ep")
    found = [f"{n} {getattr(settings, n)}" for n in sizes if getattr(settings, n) > 1]
    return found + ([f"zero_stage {settings.zero_stage}"] if settings.zero_stage else [])
