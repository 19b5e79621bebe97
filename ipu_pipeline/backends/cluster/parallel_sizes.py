"""How many ranks share what of a model, and how a rank's program runs its operations."""

from __future__ import annotations

from dataclasses import dataclass

from ipu_pipeline.ir.limits import check_count


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
                f"ep {self.ep} does not divide the {self.dp * self.cp * self.tp} ranks of a stage "
                f"(dp {self.dp} x cp {self.cp} x tp {self.tp}); use a divisor"
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
        fused_attention: No L x S tensor is made.
        fused_loss: Cross entropy is one kernel over the logits in 16 bits, in place.
        precision: dtype of the layers' products: that of the model, ``float8`` or ``float4``.
        gradient_bytes: Of one element of an accumulated gradient.
        dropout: Masks are kept, one byte an element, for each of two outputs of a layer.
        tensor_overlap: Share of tensor parallel collectives that runs beside products.
        expert_overlap: The same of the experts' all-to-all.
        pipeline_overlap: The same of copies between stages, where a rank has several.
        reserved_share: Bytes that are counted as a rank's, per byte that it uses: above 1 where
            what its allocator reserved is counted.
        whole_graph: The step is one CUDA graph: no launch costs time, nothing waits for the host.
    """

    fused: bool = False
    fused_attention: bool = True
    fused_loss: bool = False
    precision: str = ""
    gradient_bytes: int = 4
    dropout: bool = False
    tensor_overlap: float = 0.0
    expert_overlap: float = 0.0
    pipeline_overlap: float = 0.0
    reserved_share: float = 1.0
    whole_graph: bool = False


EAGER = RankEngine()
