"""Rows of the shared IPU files: read with care, because many fields are missing in many rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipu_pipeline.backends.ipu.prices.settings import FrontEnd, IPUSettings
from ipu_pipeline.errors import DatasetError
from ipu_pipeline.ir.attention import is_attention
from ipu_pipeline.ir.codec import read_json
from ipu_pipeline.ir.graph import Block, BlockGraph

Raw = Mapping[str, Any]


class UnjudgeableRowError(Exception):
    """A row that the model cannot judge; the message is the reason shown to the reader."""


@dataclass(frozen=True)
class Row:
    """One published configuration in our terms.

    Attributes:
        id: Its id in the file.
        model: Model name as published.
        arch: Architecture numbers that are given.
        task: Task in prose.
        micro_batch: Samples of one microbatch; 1 where it is not given (the least that can run).
        seq_length: Tokens of a sequence where ``arch`` does not say; 0 for unknown.
        mask_tokens: Tokens that reach the head of BERT pretraining; 0 for unknown.
        settings: Everything that the prediction needs besides the graph.
        framework: Library or application that published it.
        att_ffn_placement: ``(ipu, attentions, feed-forwards)`` in stage order, if published.
        assumptions: What was filled in.
    """

    id: str
    model: str
    arch: Mapping[str, Any]
    task: str
    micro_batch: int
    seq_length: int
    mask_tokens: int
    settings: IPUSettings
    framework: str = ""
    att_ffn_placement: tuple[tuple[int, int, int], ...] = ()
    assumptions: tuple[str, ...] = ()


def load_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of rows: a list, or a map that holds one."""
    raw = read_json(path, "the configurations", DatasetError)
    if isinstance(raw, dict):
        raw = next((value for value in raw.values() if isinstance(value, list)), [])
    return [row for row in raw if isinstance(row, dict)]


def read_row(raw: Raw) -> Row:
    """Turn one row of ``known_good_configs.json`` (or a ``config``) into settings.

    Raises:
        UnjudgeableRowError: It is no layer pipeline, or says too little to be judged.
    """
    if raw.get("tensor_parallel") not in (None, 1) or "NOT a layer pipeline" in _text(
        raw, "framework"
    ):
        raise UnjudgeableRowError("phased or tensor-parallel execution: not a layer pipeline")
    assumed: list[str] = []
    placement = tuple((ipu, *counts) for ipu, counts in raw.get("att_ffn_placement") or ())
    micro_batch = _first(
        raw, "micro_batch_size", "micro_batch", "per_device_train_batch_size", "batch_size", "batch"
    )
    if not micro_batch:
        micro_batch = 1
        assumed.append("micro batch 1 (not published)")
    settings = _settings(raw, placement, assumed)
    return Row(
        id=_text(raw, "id"),
        model=_text(raw, "model"),
        arch=_arch(raw),
        task=_text(raw, "task") or "any",
        micro_batch=micro_batch,
        seq_length=_first(raw, "seq_len", "seq", "seq_length", "sequence_length"),
        mask_tokens=_int(raw.get("mask_tokens")),
        settings=settings,
        framework=_text(raw, "framework"),
        att_ffn_placement=placement,
        assumptions=tuple(assumed),
    )


def _settings(raw: Raw, placement: Sequence[tuple[int, ...]], assumed: list[str]) -> IPUSettings:
    layers = _layers(raw, placement)
    num_ipus = _num_ipus(raw, layers, placement)
    training = "inf" not in _text(raw, "mode")
    offchip = raw.get("optimizer_state_offchip")
    if training and not isinstance(offchip, bool):
        offchip = True
        assumed.append("optimizer state off chip (not published)")
    accumulation = _first(raw, "gradient_accumulation", "gradient_accumulation_steps")
    if training and not accumulation:
        accumulation = 4 * num_ipus
        assumed.append(f"gradient accumulation {accumulation} (not published)")
    return IPUSettings(
        num_ipus=num_ipus,
        layers_per_ipu=layers,
        embedding_ipu=_int(raw.get("embedding_ipu")),
        head_ipu=_head_ipu(raw, num_ipus),
        replicas=_replicas(raw, num_ipus),
        accumulation=max(1, accumulation) if training else 1,
        # In inference TensorFlow's pipelines count their microbatches as accumulation.
        device_iterations=max(
            1, _int(raw.get("device_iterations")), 0 if training else accumulation
        ),
        proportions=_proportions(raw.get("matmul_proportion"), num_ipus),
        embedding_factor=max(1, _int(raw.get("embedding_serialization_factor"))),
        projection_factor=max(
            1,
            _int(raw.get("projection_serialization_factor"))
            or _int(raw.get("embedding_serialization_factor")),
        ),
        optimizer=_text(raw, "optimizer") or "adamw",
        optimizer_offchip=bool(offchip),
        sharded=raw.get("replicated_tensor_sharding") is True,
        half_first_moment=raw.get("enable_half_first_order_momentum") is True,
        checkpoint_layers=raw.get("recompute_checkpoint_every_layer") is not False,
        precision=_precision(raw),
        front_end=_front_end(raw),
        training=training,
        pipelined=num_ipus > 1,
        hoisted=True,
        checkpoint_bytes=_checkpoint_bytes(raw),
    )


def _layers(raw: Raw, placement: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    given = raw.get("layers_per_ipu")
    if isinstance(given, (list, tuple)) and given and all(isinstance(n, int) for n in given):
        return tuple(given)
    if placement:
        return ()
    if "lxmert" in _text(raw, "model").lower():
        return (-1,) * (_int(raw.get("ipus_per_replica")) or 1)
    if _int(raw.get("ipus_per_replica") or raw.get("ipus")) == 1:
        return (-1,)
    raise UnjudgeableRowError("no layers_per_ipu and no other placement is given")


def _num_ipus(raw: Raw, layers: Sequence[int], placement: Sequence[tuple[int, ...]]) -> int:
    used = max([len(layers), *(entry[0] + 1 for entry in placement)])
    return max(used, _int(raw.get("ipus_per_replica")) or 1)


def _head_ipu(raw: Raw, num_ipus: int) -> int | None:
    given = raw.get("head_ipu")
    mapping = raw.get("pipeline_device_mapping")
    if isinstance(given, int):
        return min(given, num_ipus - 1)
    return _int(mapping[-1]) if isinstance(mapping, list) and mapping else None


def _replicas(raw: Raw, num_ipus: int) -> int:
    given = raw.get("replication_factor")
    if isinstance(given, dict):
        given = given.get("pod16") or given.get("default")
    note = re.match(r"\s*(\d+)", _text(raw, "replication_note"))
    total = _int(raw.get("total_ipus"))
    return _int(given) or (int(note[1]) if note else 0) or max(1, total // num_ipus)


def _proportions(given: Any, num_ipus: int) -> tuple[float, ...]:
    """Published lists are sometimes one longer than the IPUs (an entry per TF stage)."""
    if isinstance(given, (int, float)):
        return (float(given),) * num_ipus
    if isinstance(given, (list, tuple)) and given:
        values = [float(v) for v in given if isinstance(v, (int, float))]
        return tuple((values + [values[-1]] * num_ipus)[:num_ipus])
    return (0.2,) * num_ipus


def _precision(raw: Raw) -> str:
    given = _text(raw, "precision")
    if given.startswith("32"):
        return "32.32"
    half = raw.get("enable_half_partials")
    return "16.32" if given.startswith("16.32") or half is False else "16.16"


def _checkpoint_bytes(raw: Raw) -> int:
    kept = f"{raw.get('activation_checkpoint_dtype')} {raw.get('precision')}".upper()
    return 1 if "FLOAT8" in kept or "FP8" in kept else 0


def _front_end(raw: Raw) -> FrontEnd:
    name = _text(raw, "framework").lower()
    return "popart" if "popart" in name else "poptorch"


def _arch(raw: Raw) -> dict[str, Any]:
    arch = raw.get("arch") or {}
    nested = arch.get("text") or {}
    return {k: v for k, v in {**nested, **arch}.items() if v is not None}


def _text(raw: Raw, key: str) -> str:
    value = raw.get(key)
    return value if isinstance(value, str) else ""


def _first(raw: Raw, *keys: str) -> int:
    """Return the first of several spellings of a number that the row has; 0 for none."""
    return next((found for key in keys if (found := _int(raw.get(key)))), 0)


def _int(value: Any) -> int:
    """Read a number that may be text: ``16..4096 (batch/DI)``, ``~128``, ``>20`` (at least 21)."""
    if isinstance(value, bool) or value is None:
        return 0
    if isinstance(value, (int, float)):
        return int(value)
    found = re.search(r"(>?)\s*(\d+)", value) if isinstance(value, str) else None
    return int(found[2]) + len(found[1]) if found else 0


def misfit_row(raw: Raw) -> Row:
    """Read the ``config`` of a row of ``does_not_fit.json``; unset fields are IPUConfig defaults.

    Raises:
        UnjudgeableRowError: It is no out-of-memory row, or not a full configuration.
    """
    if raw.get("kind") != "oom":
        raise UnjudgeableRowError(f"kind {raw.get('kind')!r}: not an out-of-memory configuration")
    config = dict(raw.get("config") or {})
    if not config.get("model") or "op" in config:
        raise UnjudgeableRowError("no model is given")
    config = {
        "optimizer_state_offchip": False,
        "recompute_checkpoint_every_layer": False,
        "ipus_per_replica": config.get("ipus"),
        "id": raw.get("id"),
        **config,
    }
    row = read_row(config)
    sharing = config.get("recompute") is not False
    return replace(row, settings=replace(row.settings, recompute=sharing))


def throughput_row(config: Raw, measured: Raw) -> Row:
    """Join a measured row with its configuration; what was measured overrides.

    Raises:
        UnjudgeableRowError: The configuration cannot be judged.
    """
    merged = dict(config)
    overriding = {
        "micro_batch_size": "micro_batch_size",
        "gradient_accumulation": "gradient_accumulation",
        "device_iterations": "device_iterations",
        "replication_factor": "replication_factor",
        "precision": "precision",
        "total_ipus": "total_ipus",
    }
    for source, key in overriding.items():
        if measured.get(source) is not None:
            merged[key] = measured[source]
    if measured.get("framework") and not merged.get("framework"):
        merged["framework"] = measured["framework"]
    arch = dict(merged.get("arch") or {})
    if measured.get("seq_len") and not arch.get("seq_len"):
        arch["seq_len"] = measured["seq_len"]
    merged["arch"] = arch
    return read_row(merged)


def chip_name(measured: Raw) -> str:
    """Return the machine family of a measured row: ``bow`` or ``gc200``."""
    text = f"{measured.get('ipu_generation')} {measured.get('hardware')}".lower()
    return "bow" if "bow" in text else "gc200"


def placed_layers(row: Row, graph: BlockGraph) -> tuple[dict[str, int] | None, str]:
    """Return the IPU of every layer block where counts of layers do not say it, and a note.

    Attention and feed-forward placed alone: an entry ``(ipu, attentions, feed-forwards)`` takes
    the next of each in execution order. Counts that add up to another number (published lists
    count convolutions or stages, too) are scaled to the layers there are.
    """
    layers = [block for block in graph.blocks if block.kind == "layer"]
    if row.att_ffn_placement:
        return _placed_halves(row.att_ffn_placement, layers), ""
    counts = row.settings.layers_per_ipu
    if -1 in counts or sum(counts) in (0, len(layers)):
        return None, ""
    counted, note = layers, f"layers_per_ipu counts {sum(counts)} layers, scaled to {len(layers)}"
    for number in range(len(layers)):
        if sum(counts) == len(layers) - number and _family(layers[number]) != _family(layers[0]):
            counted = layers[number:]
            note = f"layers_per_ipu does not count the first {number} layers"
    ends = [sum(counts[: ipu + 1]) / sum(counts) * len(counted) for ipu in range(len(counts))]
    placed = dict.fromkeys((block.name for block in layers), row.settings.embedding_ipu)
    for position, block in enumerate(counted):
        placed[block.name] = next(i for i, end in enumerate(ends) if position + 0.5 <= end + 1e-9)
    return placed, note


def _family(block: Block) -> str:
    """Name of the list that a layer is in: ``encoder.layers`` of ``encoder.layers.3``."""
    return re.sub(r"\.\d+.*$", "", block.name)


def _placed_halves(
    placement: Sequence[tuple[int, int, int]], layers: Sequence[Block]
) -> dict[str, int]:
    units: list[tuple[bool, list[str]]] = []
    for block in layers:
        attention = any(is_attention(op) for op in block.forward_ops)
        if not units or units[-1][0] != attention:
            units.append((attention, []))
        units[-1][1].append(block.name)
    placed: dict[str, int] = {}
    left = iter(units)
    for ipu, attentions, feed_forwards in placement:
        for _ in range(attentions + feed_forwards):
            unit = next(left, None)
            if unit is not None:
                placed.update(dict.fromkeys(unit[1], ipu))
    return placed
