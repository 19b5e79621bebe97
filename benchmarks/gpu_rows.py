"""Published GPU runs (``../shared/data/gpu``) as what a price needs: sizes, split, seconds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

from ipu_pipeline.backends.cluster.parallel_sizes import ParallelSizes

Raw = Mapping[str, Any]
GIBIBYTE = 2**30
_MACHINES = (
    (r"gb300", "gb300"), (r"gb200", "gb200"), (r"b300", "b300"), (r"b200", "b200"),
    (r"gh200", "gh200"), (r"h200", "h200"), (r"h100.*96 ?gb", "h100-96g"), (r"h100", "h100"),
    (r"a100.*40.*pcie", "a100-40g-pcie"), (r"a100.*pcie", "a100-80g-pcie"),
    (r"a100.*40", "a100-40g"), (r"a100", "a100-80g"), (r"3090", "rtx3090"), (r"4090", "rtx4090"),
    (r"l40s", "l40s"), (r"\bl4\b", "l4"), (r"mi300x", "mi300x"),
)  # fmt: skip


class UnjudgedRowError(Exception):
    """A row that says too little, with the reason."""


@dataclass(frozen=True)
class GpuRow:
    """One published run.

    Attributes:
        id: Name of the row.
        raw: What was published.
        machine: Name of the machine, all GPUs of the run.
        sizes: Parallel sizes.
        microbatches: Of one step of one pipeline.
        precision: ``bfloat16``, ``float8`` or ``float4``.
        schedule: Name of ours, or ``zero_bubble_2p``.
        assumptions: What the row does not say and was taken.
    """

    id: str
    raw: Raw
    machine: str
    sizes: ParallelSizes
    microbatches: int
    precision: str
    schedule: str
    assumptions: tuple[str, ...] = field(default=())

    @property
    def quality(self) -> str:
        """A, B or C."""
        return str(self.raw.get("quality") or "C")[0]

    @property
    def source(self) -> str:
        """Where it was published, without the place in the repository."""
        return re.split(r"[@:,]", str(self.raw["source"]))[0]

    @property
    def memory_bytes(self) -> float | None:
        """Published peak of a GPU."""
        found = self.raw.get("memory_gb")
        if found is None:
            return None
        # torch counts in GiB and papers print that as GB; the files of CI hold bytes.
        return float(found) * (1e9 if self.quality == "B" else GIBIBYTE)


def read_row(raw: Raw) -> GpuRow:
    """Return a published run.

    Raises:
        UnjudgedRowError: It does not say what a price needs.
    """
    if str(raw.get("quality") or "C").startswith("C"):
        raise UnjudgedRowError("batch, sequence or schedule is not stated (quality C)")
    assumptions: list[str] = []
    sizes, gpus = _sizes(raw, assumptions)
    samples = raw.get("global_batch")
    if raw.get("microbatches"):
        count = int(raw["microbatches"])
    elif samples:
        count, rest = divmod(int(samples), sizes.dp * sizes.micro_batch)
        if rest or not count:
            raise UnjudgedRowError(
                f"global batch {samples} does not divide into dp {sizes.dp} x micro batch "
                f"{sizes.micro_batch}"
            )
    else:
        raise UnjudgedRowError("no global batch")
    return GpuRow(
        id=str(raw["id"]),
        raw=raw,
        machine=f"{_machine(raw)}-x{gpus}",
        sizes=sizes,
        microbatches=count,
        precision=_precision(str(raw.get("precision") or "")),
        schedule=_schedule(raw, sizes),
        assumptions=tuple(assumptions),
    )


def _machine(raw: Raw) -> str:
    name = str(raw.get("gpu") or "").lower()
    for pattern, found in _MACHINES:
        if re.search(pattern, name):
            return found
    raise UnjudgedRowError(f"GPU {raw.get('gpu')!r} is not described")


def _sizes(raw: Raw, assumptions: list[str]) -> tuple[ParallelSizes, int]:
    one = {key: int(raw.get(key) or 1) for key in ("tp", "pp", "cp", "ep", "vpp")}
    ranks = one["tp"] * one["pp"] * one["cp"]
    gpus = raw.get("gpus")
    if gpus is None:
        raise UnjudgedRowError("the number of GPUs is not stated")
    if int(gpus) % ranks:
        raise UnjudgedRowError(f"tp x pp x cp = {ranks} does not divide {gpus} GPUs")
    micro = raw.get("micro_batch")
    if micro is None:
        assumptions.append("the micro batch is not stated: 1")
    try:
        found = ParallelSizes(
            **one,
            dp=int(gpus) // ranks,
            zero_stage=1,
            micro_batch=int(micro or 1),
            recompute=_recompute(raw.get("recompute")),
        )
    except ValueError as error:
        raise UnjudgedRowError(str(error)) from error
    return found, int(gpus)


def _recompute(given: Any) -> tuple[str, ...]:
    if isinstance(given, Mapping):
        modules = tuple(re.findall(r"\w+", str(given.get("modules") or "")))
        return ("full",) if given.get("granularity") == "full" else modules
    text = str(given or "")
    if text.startswith("full"):
        return ("full",)
    return tuple(n for n in ("core_attn", "mlp", "moe_act", "layernorm") if n in text)


def _precision(text: str) -> str:
    lower = text.lower()
    if "fp4" in lower:
        return "float4"
    return "float8" if "fp8" in lower or "float8" in lower else "bfloat16"


def _schedule(raw: Raw, sizes: ParallelSizes) -> str:
    text = str(raw.get("schedule") or "").lower()
    if "zb-2p" in text:
        return "zero_bubble_2p"
    if "zb-1p" in text:
        return "interleaved_zero_bubble"
    if "gpipe" in text:
        return "gpipe"
    if sizes.vpp > 1:
        return "interleaved"
    return "1f1b"


def measured_s(row: GpuRow, num_layers: int) -> float:
    """Return the published seconds of a step, from whatever was published.

    Raises:
        UnjudgedRowError: No speed was.
    """
    raw = row.raw
    if raw.get("step_seconds"):
        return float(raw["step_seconds"])
    samples = row.microbatches * row.sizes.dp * row.sizes.micro_batch
    gpus, tokens = row.sizes.num_devices, samples * int(raw["seq"])
    if raw.get("tokens_per_s_per_gpu"):
        return tokens / (float(raw["tokens_per_s_per_gpu"]) * gpus)
    if raw.get("tokens_per_s"):
        return tokens / float(raw["tokens_per_s"])
    if raw.get("samples_per_s_per_gpu"):
        return samples / (float(raw["samples_per_s_per_gpu"]) * gpus)
    flops = model_flops(raw, samples, num_layers, recomputed="full" in row.sizes.recompute)
    if raw.get("tflops_per_gpu"):
        return flops / (float(raw["tflops_per_gpu"]) * 1e12 * gpus)
    if raw.get("mfu_percent"):
        return flops / (float(raw["mfu_percent"]) / 100 * 312e12 * gpus)
    raise UnjudgedRowError("no speed was published")


def model_flops(raw: Raw, samples: int, num_layers: int, *, recomputed: bool) -> float:
    """Return the FLOPs that Megatron-LM divides by the time: attention counted whole.

    Source: Narayanan et al., SC 2021, equation 3, without recomputation 72 instead of 96.
    """
    if raw.get("hidden") is None:
        raise UnjudgedRowError("FLOP/s of a model whose sizes the row does not give")
    hidden, seq, vocab = int(raw["hidden"]), int(raw["seq"]), int(raw.get("vocab") or 0)
    heads = int(raw.get("heads") or 1)
    kv, ffn = int(raw.get("kv_heads") or heads), int(raw.get("ffn") or 4 * hidden)
    gates = 3 if "llama" in str(raw.get("model")).lower() else 2
    per_token = (
        2 * hidden * hidden * (2 + 2 * kv / heads) + 2 * gates * hidden * ffn + 4 * seq * hidden
    )
    passes = 4 if recomputed else 3
    tokens = samples * seq
    return tokens * (passes * num_layers * per_token + 3 * 2 * hidden * vocab)


# -- splits -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """What one stage holds.

    Attributes:
        layers: Number of decoder layers, in order from the first stage on.
        embedding: Share of the embedding.
        head: Share of head and loss.
        extra: Multi-token prediction layers.
    """

    layers: int
    embedding: float = 0.0
    head: float = 0.0
    extra: int = 0


def parse_layout(text: str) -> tuple[Chunk, ...]:
    """Read a layout of Megatron: ``Et*2|(t*2|)*34,t*3|tL``."""
    flat, rest = _sequence(text.replace(",", "").replace(" ", ""))
    if rest:
        raise UnjudgedRowError(f"layout {text!r} does not end where it should: {rest!r}")
    return tuple(
        Chunk(part.count("t"), float("E" in part), float("L" in part), part.count("m"))
        for part in flat.split("|")
    )


def _sequence(text: str) -> tuple[str, str]:
    found = ""
    while text and text[0] != ")":
        if text[0] == "(":
            one, text = _sequence(text[1:])
            text = text[1:]
        else:
            one, text = text[0], text[1:]
        times = re.match(r"\*(\d+)", text)
        if times:
            text = text[times.end() :]
        found += one * (int(times[1]) if times else 1)
    return found, text


def chunks_of(row: GpuRow, num_layers: int, head_layers: float, extra: int) -> tuple[Chunk, ...]:
    """Return what every stage of a run holds.

    Args:
        row: The run.
        num_layers: Decoder layers of the model.
        head_layers: FLOPs of the head in those of a layer.
        extra: Multi-token prediction layers of the model.

    Raises:
        UnjudgedRowError: The model has less layers than the run has stages.
    """
    split, depth = str(row.raw.get("split") or ""), row.sizes.pp * row.sizes.vpp
    if num_layers + 2 < depth:
        raise UnjudgedRowError(f"{num_layers} layers are less than its {depth} stages")
    if "|" in split:
        layout = parse_layout(split)
        if len(layout) == depth and sum(c.layers for c in layout) == num_layers:
            return layout
    if "spread" in split or "tensor-parallel over all" in split:
        counts = _even(num_layers, depth)
        return tuple(Chunk(n, 1 / row.sizes.pp, 1 / row.sizes.pp) for n in counts)
    if "moved by estimated" in split:
        counts = _balanced(num_layers, depth, head_layers)
    elif "one layer fewer" in split:
        counts = _even(num_layers + 2, depth)
        counts[0], counts[-1] = counts[0] - 1, counts[-1] - 1
    else:
        counts = _even(num_layers, depth)
    last = depth - 1
    return tuple(
        Chunk(n, float(i == 0), float(i == last), extra if i == last else 0)
        for i, n in enumerate(counts)
    )


def _even(num_layers: int, depth: int) -> list[int]:
    if num_layers % depth == 0:
        return [num_layers // depth] * depth
    if (num_layers + 2) % depth == 0:  # embedding and head count as a layer each
        each = (num_layers + 2) // depth
        return [each - 1, *[each] * (depth - 2), each - 1]
    each = ceil(num_layers / depth)
    counts: list[int] = []
    for _ in range(depth):
        counts.append(min(each, num_layers - sum(counts)))
    return counts


def _balanced(num_layers: int, depth: int, head_layers: float) -> list[int]:
    """Whole layers so that the busiest stage has least to do; the last one has the head.

    Later stages take what is left over: they keep fewer microbatches.
    """
    best, found = inf, [num_layers]
    if depth == 1:
        return found
    for last in range(num_layers + 1):
        others, more = divmod(num_layers - last, depth - 1)
        most = max(others + (more > 0), last + head_layers)
        if most < best:
            best = most
            found = [others + (i >= depth - 1 - more) for i in range(depth - 1)] + [last]
    return found
