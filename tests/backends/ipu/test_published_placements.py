"""Acceptance: published ``layers_per_ipu`` give the published placement, block by block."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ipu_pipeline as ipp
from benchmarks.ipu_architectures import Architecture, _build_config, architecture
from benchmarks.ipu_rows import UnjudgeableRowError, read_row
from ipu_pipeline.backends.ipu.annotations import annotate
from ipu_pipeline.backends.ipu.bundle import model_parallel_text
from ipu_pipeline.backends.ipu.check import check
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices import predict
from ipu_pipeline.backends.ipu.settings import settings_for
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.ir.plan import Plan
from tests.later import one_in

ROWS = Path(__file__).parents[4] / "shared/data/ipu/known_good_configs.json"
pytestmark = pytest.mark.skipif(
    not ROWS.is_file(), reason="the shared IPU files (../shared/data/ipu) are not here"
)

# Rows of PyTorch training runs that are not compared, by the beginning of their id.
OUT_OF_SCOPE = {
    "ex_pt_mae": "masked auto-encoding is no task here; 8 entries name 4 IPUs of two stages each",
    "ex_pt_dino": "a student and a teacher network in one program",
    "ex_pt_clip": "no layers_per_ipu is published",
    "ex_pt_minidalle": "DALL-E: no such architecture in transformers",
    "hub_lxmert": "no layers_per_ipu: the published placement is code of its library",
    "og_lxmert": "no layers_per_ipu: the published placement is code of its library",
    "hub_wav2vec2": "counts projections and positions as layers, too (23, 35, 33 entries)",
}


def _rows() -> list[dict[str, Any]]:
    if not ROWS.is_file():
        return []
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    front_ends = ("PyTorch (PopTorch)", "optimum-graphcore")
    return [r for r in rows if r["mode"] == "train" and r["framework"] in front_ends]


def _compared() -> list[dict[str, Any]]:
    """One row of each set that asks for the same placement of the same model."""
    found = {}
    for row in _rows():
        if not row["id"].startswith(tuple(OUT_OF_SCOPE)):
            what = (row["model"], row["arch"].get("layers"), row["task"])
            key = (*what, *row["layers_per_ipu"], row.get("embedding_serialization_factor"))
            found.setdefault(key, row)
    return list(found.values())


@cache
def _model(wanted: Architecture, factor: int) -> tuple[nn.Module, dict[str, Any]]:
    config = _build_config(wanted)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary and vocabulary % factor:  # the published library pads the table, too
        config.vocab_size = vocabulary + factor - vocabulary % factor
    return from_config(config, wanted.task, batch_size=1, seq_length=wanted.seq_length)


def _plan(row: dict[str, Any]) -> tuple[Plan, IPUConfig]:
    factor = row.get("embedding_serialization_factor") or 1
    model, batch = _model(architecture(read_row({**row, "micro_batch_size": 1})), factor)
    accumulation = row.get("gradient_accumulation")
    optional = {
        name: row[name]
        for name in ("matmul_proportion", "replicated_tensor_sharding", "enable_half_partials")
        if row.get(name) is not None
    }
    config = IPUConfig(
        layers_per_ipu=tuple(row["layers_per_ipu"]),
        replication_factor=row.get("replication_factor") or 1,
        gradient_accumulation_steps=accumulation if isinstance(accumulation, int) else 32,
        embedding_serialization_factor=factor,
        optimizer_state_offchip=True,
        recompute_checkpoint_every_layer=True,
        **optional,
    )
    pod = "pod16" if config.replicas() * config.num_ipus() <= 16 else "pod64"
    plan = ipp.plan(model, batch, machine=pod, config=config, replicas=config.replicas())
    return plan, config


def _published(row: dict[str, Any], plan: Plan) -> dict[str, int]:
    """Return the IPU of every block as the row's source describes it."""
    counts = row["layers_per_ipu"]
    layers = [b.name for b in plan.blocks if b.kind == "layer"][-sum(counts) :]
    owners = [ipu for ipu, count in enumerate(counts) for _ in range(count)]
    placed = dict(zip(layers, owners, strict=True))
    tied = any("embedding" in _kinds(plan, group) for group in plan.tied_groups)
    head = row.get("head_ipu")
    if head is None:
        head = 0 if tied else len(counts) - 1
    current, names = 0, [block.name for block in plan.blocks]
    for position, block in enumerate(plan.blocks):
        if block.name in placed:
            current = placed[block.name]
        elif block.kind == "embedding" or position < names.index(layers[0]):
            placed[block.name] = 0
        else:
            behind = position > names.index(layers[-1])
            placed[block.name] = head if behind else current
    return placed


def _kinds(plan: Plan, names: tuple[str, ...]) -> set[str]:
    return {block.kind for block in plan.blocks if block.name in names}


@pytest.mark.parametrize("row", one_in(4, _compared()), ids=lambda row: row["id"])
def test_the_emitted_placement_is_the_published_one(row: dict[str, Any]) -> None:
    plan, config = _plan(row)
    settings = settings_for(plan, config)
    check(plan, settings)
    published = _published(row, plan)
    assert {a.block: a.ipu for a in annotate(plan)} == published
    # the file says the same, and the configuration comes back as published
    written: dict[str, Any] = {}
    exec(model_parallel_text(plan, annotate(plan)), written)
    assert {b["block"]: b["ipu"] for b in written["BLOCKS"]} == {
        name: ipu for name, ipu in published.items() if name != "loss"
    }
    assert settings.config.layers_per_ipu == tuple(row["layers_per_ipu"])
    # what is recomputed is said, and the price of what is emitted is the plan's
    assert settings.to_json()["recompute"] is (len(row["layers_per_ipu"]) > 1)
    assert predict(plan.graph, settings.config, plan.machine).time.total_s == plan.objective_s


def test_the_comparison_covers_what_was_published() -> None:
    types = {architecture(read_row(row)).model_type for row in _compared()}
    assert types == {
        "bert", "bart", "convnext", "deberta", "distilbert", "gpt2", "hubert", "mpnet", "roberta",
        "swin", "vit",
    }  # fmt: skip
    assert len(_compared()) >= 25


def test_rows_out_of_scope_are_just_those() -> None:
    for row in _rows():
        if row["id"].startswith(tuple(OUT_OF_SCOPE)):
            try:
                read = read_row(row)
                wanted = architecture(read)
            except UnjudgeableRowError:
                continue
            counts = row.get("layers_per_ipu")
            layers = dict(wanted.numbers).get("num_hidden_layers")
            assert counts is None or sum(counts) != layers, row["id"]
