"""Published GPU runs (``../shared/data/gpu``) as what a price needs: sizes, split, seconds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

from ipu_pipeline.backends.cluster.layouts.megatron_layout import parse_layout
from ipu_pipeline.backends.cluster.prices.parallel_sizes import ParallelSizes
from ipu_pipeline.errors import PlanError

Raw = Mapping[str, Any]
GIBIBYTE = 2**30
_MACHINES = (
    (r"gb300", "gb300"), (r"gb200", "gb200"), (r"b300", "b300"), (r"b200", "b200"),
    (r"gh200", "gh200"), (r"h200", "h200"), (r"h100.*96 ?gb", "h100-96g"), (r"h100", "h100"),
    (r"a100.*40.*pcie", "a100-40g-pcie"), (r"a100.*pcie", "a100-80g-pcie"),
    (r"a100.*40", "a100-40g"), (r"a100", "a100-80g"), (r"3090", "rtx3090"), (r"4090", "rtx4090"),
    (r"l40s", "l40s"), (r"\bl4\b", "l4"), (r"mi300x", "mi300x"),
)  # fmt: skip
# What a source calls a schedule, the first that matches; others are 1F1B, interleaved where a rank
# has several stages.
_SCHEDULES = (
    (r"zb.?2p|zb.?h2", "zero_bubble_2p"), (r"dual.?pipe", "dualpipev"),
    (r"zb.?v|v.?zb|v.?half|v.?min", "zbv"), (r"zb|zero.?bubble", "interleaved_zero_bubble"),
    (r"gpipe|afab|all.forward", "gpipe"), (r"looped.?bfs|breadth", "looped_bfs"),
)  # fmt: skip
_IN_A_V = ("dualpipev", "zbv")
_SEVERAL_STAGES = r"(?<!non-)interleaved|zb.?v|v-half|v-min|v-zb|dualpipe"
_PLAIN_SCHEDULES = r"1f1b|interleav|flush|fsdp|zero.?[0-3]|ddp|not stated"
# How sources say that whole layers are recomputed, or that nothing is.
_WHOLE_LAYERS = r"\bfull\b|(every|all) layer|^(true|yes|uniform)|activation (checkpoint|recomput)"
_NO_RECOMPUTATION = r"^(no|none|false|off|without|0)\b"
# torchtitan cuts its batch into as many microbatches as there are stages unless told otherwise.
_TITAN = "torchtitan"
_NOTHING = ("", "n/a", "na", "none", "null", "-", "not stated")
_PARTS = {
    "core_attn": r"core_attn|core attention|attention|selective", "mlp": r"\bmlp\b",
    "moe_act": "moe_act|activation func", "layernorm": r"layer.?norm|\bnorms?\b",
    "mla_up_proj": "mla_up_proj",
}  # fmt: skip


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
        return re.split(r"[@:,]", str(self.raw.get("source") or "not stated"))[0]

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
    sizes = _sizes(raw, assumptions)
    count = _microbatches(raw, sizes, assumptions)
    return GpuRow(
        id=str(raw.get("id") or "without a name"),
        raw=raw,
        machine=f"{machine_of(str(raw.get('gpu') or ''))}-x{sizes.num_devices}",
        sizes=sizes,
        microbatches=count,
        precision=_precision(str(raw.get("precision") or "")),
        schedule=_schedule(raw, sizes, assumptions),
        assumptions=tuple(assumptions),
    )


def machine_of(gpu: str) -> str:
    """Return the family of machines with a GPU, by what somebody calls it.

    Raises:
        UnjudgedRowError: There is none.
    """
    for pattern, found in _MACHINES:
        if re.search(pattern, gpu.lower()):
            return found
    raise UnjudgedRowError(f"GPU {gpu!r} is not described")


def _sizes(raw: Raw, assumptions: list[str]) -> ParallelSizes:
    one = {key: number(raw, key) or 1 for key in ("tp", "pp", "cp", "ep", "vpp")}
    if number(raw, "vpp") is None and re.search(_SEVERAL_STAGES, _words(raw)):
        one["vpp"] = 2
        assumptions.append("stages of a rank are not stated: 2, the least that interleave")
    ranks = one["tp"] * one["pp"] * one["cp"]
    gpus, dp = number(raw, "gpus"), number(raw, "dp")
    if gpus is None and dp is None:
        raise UnjudgedRowError("the number of GPUs is not stated")
    if gpus is not None and gpus % ranks:
        raise UnjudgedRowError(f"tp x pp x cp = {ranks} does not divide {gpus} GPUs")
    dp = dp or 1 if gpus is None else gpus // ranks
    try:
        return ParallelSizes(
            **one,
            dp=dp,
            zero_stage=_zero_stage(raw, one["pp"]),
            micro_batch=_micro_batch(raw, one["pp"] * one["vpp"], dp, assumptions),
            recompute=_recompute(raw.get("recompute")),
        )
    except ValueError as error:
        raise UnjudgedRowError(str(error)) from error


def _zero_stage(raw: Raw, pp: int) -> int:
    """Stage 1, as Megatron; as stated; FSDP without a pipeline gathers weights, too."""
    text = " ".join(str(raw.get(key)) for key in ("schedule", "split", "recompute", "note")).lower()
    stated = re.search(r"zero[-_ ]?(?:stage[-_ ]?)?([0-3])", text)
    if stated:
        return int(stated[1])
    return 3 if "fsdp" in text and pp == 1 else 1


def is_nothing(value: Any) -> bool:
    """Whether a field says nothing."""
    return value is None or str(value).strip().lower() in _NOTHING


def number(raw: Raw, key: str) -> int | None:
    """Return a whole number, however it is spelled; ``None`` where the source has none."""
    if is_nothing(raw.get(key)):
        return None
    text = str(raw[key]).replace(",", "").strip()
    try:
        found = float(text)
    except ValueError:
        raise UnjudgedRowError(f"{key} is {raw.get(key)!r}, which is no number") from None
    if not found.is_integer():
        raise UnjudgedRowError(f"{key} is {raw.get(key)!r}, which is not whole")
    return int(found)


def _words(raw: Raw) -> str:
    return str(raw.get("schedule") or "").lower()


def _global_batch(raw: Raw, dp: int) -> int | None:
    """Samples of a step; some sources state those of one pipeline."""
    local = re.search(r"local batch (\d+)", str(raw.get("note") or ""))
    return number(raw, "global_batch") or (int(local[1]) * dp if local else None)


def _micro_batch(raw: Raw, depth: int, dp: int, assumptions: list[str]) -> int:
    stated, count = number(raw, "micro_batch"), number(raw, "microbatches")
    if stated is not None:
        return stated
    samples = _global_batch(raw, dp)
    if count is None and _TITAN in str(raw.get("source")):
        count = depth
    if samples is not None and count and samples % (dp * count) == 0:
        assumptions.append(f"the micro batch is not stated: that of {count} microbatches")
        return max(1, samples // (dp * count))
    assumptions.append("the micro batch is not stated: 1")
    return 1


def _microbatches(raw: Raw, sizes: ParallelSizes, assumptions: list[str]) -> int:
    stated = number(raw, "microbatches")
    if stated:
        return stated
    samples = _global_batch(raw, sizes.dp)
    if not samples:
        raise UnjudgedRowError("no global batch")
    count, rest = divmod(samples, sizes.dp * sizes.micro_batch)
    if rest:
        assumptions.append(
            f"global batch {samples} does not divide into dp {sizes.dp} x micro batch "
            f"{sizes.micro_batch}: {count + 1} microbatches"
        )
    return count + (rest > 0)


def _recompute(given: Any) -> tuple[str, ...]:
    if isinstance(given, Mapping):
        modules = str(given.get("modules") or "")
        if given.get("granularity") == "full":
            return ("full",)
    else:
        modules = str(given or "").lower()
        if re.search(_NO_RECOMPUTATION, modules):
            return ()
        if re.search(_WHOLE_LAYERS, modules) and "selective" not in modules:
            return ("full",)
    return tuple(part for part, words in _PARTS.items() if re.search(words, modules))


def _precision(text: str) -> str:
    lower = text.lower()
    if re.search(r"32|64|int", lower) and not re.search(r"16|8\b|4\b|mixed", lower):
        raise UnjudgedRowError(f"precision {text!r} has no price here")
    if re.search(r"(fp|float|nvfp|mxfp)_?4", lower):
        return "float4"
    return "float8" if re.search(r"(fp|float)_?8|e4m3|hybrid", lower) else "bfloat16"


def _schedule(raw: Raw, sizes: ParallelSizes, assumptions: list[str]) -> str:
    text = _words(raw)
    if sizes.pp * sizes.vpp == 1:
        return "1f1b"
    for pattern, name in _SCHEDULES:
        if re.search(pattern, text) and (name not in _IN_A_V or sizes.vpp == 2):
            return name
    found = "interleaved" if sizes.vpp > 1 else "1f1b"
    if not is_nothing(text) and not re.search(_PLAIN_SCHEDULES, text):
        assumptions.append(f"schedule {text!r} has no price here: {found}")
    return found


def measured_s(row: GpuRow, flops: float, peak_flops_per_s: float) -> float:
    """Return the published seconds of a step, from whatever was published.

    Args:
        row: The run.
        flops: Of the model in one step, as sources count them: attention whole.
        peak_flops_per_s: What an MFU is a share of.

    Raises:
        UnjudgedRowError: No speed was.
    """
    raw, gpus = row.raw, row.sizes.num_devices
    samples = row.microbatches * row.sizes.dp * row.sizes.micro_batch
    tokens = samples * (number(raw, "seq") or 0)
    for key, work in (
        ("tokens_per_s_per_gpu", tokens / gpus),
        ("tokens_per_s", tokens),
        ("samples_per_s_per_gpu", samples / gpus),
        ("samples_per_s", samples),
        ("tflops_per_gpu", flops / (1e12 * gpus)),
        ("mfu_percent", 100 * flops / (peak_flops_per_s * gpus)),
    ):
        if raw.get("step_seconds"):
            return float(raw["step_seconds"])
        if raw.get(key):
            return work / float(raw[key])
    raise UnjudgedRowError("no speed was published")


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


def chunks_of_layout(text: str) -> tuple[Chunk, ...]:
    """Read a layout of Megatron: ``Et*2|(t*2|)*34,t*3|tL``; empty: the text is none."""
    try:
        stages = parse_layout(text).stages
    except PlanError:
        return ()
    return tuple(
        Chunk(part.count("t"), float("E" in part), float("L" in part), part.count("m"))
        for part in stages
    )


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
    stated = [int(one) for one in re.findall(r"\d+", split)]
    if "|" not in split and len(stated) == depth > 1 and sum(stated) == num_layers:
        return _with_ends(stated, extra)
    if "|" in split:
        layout = chunks_of_layout(split)
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
    return _with_ends(counts, extra)


def _with_ends(counts: list[int], extra: int) -> tuple[Chunk, ...]:
    last = len(counts) - 1
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
