"""Hand layouts against ours, and the sign of redistributing: ``python -m benchmarks.hand_layouts``.

Every layout of ``../shared/data/gpu/hand_layouts.json`` is priced from a ``config.json``, and so is
our split for the same model, sizes and memory: the most that a rank of the hand layout holds. What
the recipes leave open is taken as :data:`RECIPES` says. CPU seconds are those of one core from the
config to the plan. Then every two published runs that differ
in their split only: is the quicker one predicted to be the quicker one?
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig

from benchmarks.gpu_accuracy import SHARED
from benchmarks.gpu_models import known_config
from benchmarks.gpu_rows import UnjudgedRowError
from benchmarks.gpu_runs import read_run
from ipu_pipeline.backends.cluster.layouts.given_layout import (
    GivenLayout,
    captured_model,
    own_plan,
)
from ipu_pipeline.backends.cluster.layouts.megatron_layout import blocks_of, layout_of, parse_layout
from ipu_pipeline.backends.cluster.prices.rank_plan import rank_step_of
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.text import render_table
from ipu_pipeline.planner.report.compare import reason

HAND = SHARED.with_name("hand_layouts.json")
EVEN = "even layers"
TIE = 0.01  # published differences below it are noise
SEARCH_S = 120.0  # far more than it takes: other work on the machine plays no role
# Beyond what a machine reserves: kernels' buffers are rounded up.
_SLACK = 1.001
_POSITIONS = 131072  # as many as a layout's sequence asks for: they have no weights
# Config, and what the layouts' recipes leave open: sequence, samples of a step, expert parallel
# ranks, GPUs, precision. Where a row gives tp, pp, vpp or the GPUs, those count.
RECIPES: Mapping[str, dict[str, Any]] = {
    "Llama 3 70B": {"seq": 8192, "batch": 256, "precision": "float8"},
    "DeepSeek-V3": {"seq": 4096, "batch": 8192, "tp": 2, "ep": 64, "gpus": 1024},
    "Kimi K2": {"seq": 4096, "batch": 8192, "tp": 2, "ep": 64, "gpus": 1024, "pp": 16, "vpp": 2},
    "Qwen3-MoE (VL or Next; see the recipe)": {
        "seq": 4096, "batch": 4096, "ep": 32, "gpus": 256, "pp": 2, "vpp": 4,
    },
    "GLM-5.2": {"seq": 4096, "batch": 1024, "ep": 16, "dp": 16},
}  # fmt: skip


def config_of(model: str) -> dict[str, Any]:
    """Return the config.json of a model: public facts, or the defaults of transformers' class."""
    facts = known_config(model)
    if facts:
        named = {"llama": "LlamaForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
        own = {"architectures": [named[facts["model_type"]]], "max_position_embeddings": _POSITIONS}
        return {**facts, **own}
    kind, architecture = ("glm_moe_dsa", "GlmMoeDsaForCausalLM") if model.startswith("GLM") else (
        "qwen3_next", "Qwen3NextForCausalLM")  # fmt: skip
    return {**AutoConfig.for_model(kind).to_dict(), "architectures": [architecture]}


def compared(row: Mapping[str, Any]) -> dict[str, Any]:
    """Price one hand layout, and plan our split for the same sizes and memory."""
    begin, recipe = time.process_time(), RECIPES[row["model"]]
    # "...17 x tttt..." is how the file shortens seventeen equal stages.
    layout = parse_layout(re.sub(r"\|tttt\|\.\.\.17 x tttt\.\.\.\|", "|(t*4|)*17,", row["layout"]))
    stages = len(layout.stages)
    pp = row.get("pp") or recipe.get("pp") or stages // (row.get("vpp") or 1)
    tp = row.get("tp") or recipe.get("tp") or 1
    count, gpu = re.fullmatch(r"(?:(\d+) x )?(\w+)", row.get("gpu") or "H100").groups()  # type: ignore[union-attr]
    gpus = int(count or recipe.get("gpus") or recipe["dp"] * pp * tp)
    machine = machine_by_name(f"{gpu.lower()}-x{gpus}")
    sizes = {"pp": pp, "tp": tp, "ep": recipe.get("ep", 1), "global_batch": recipe["batch"]}
    settings = {"engine": "megatron"}
    if "precision" in recipe:
        settings["precision"] = recipe["precision"]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config_of(row["model"])), encoding="utf-8")
        model = captured_model(str(file), None, 1, recipe["seq"])
    said = GivenLayout(lambda graph: blocks_of(layout, graph), sizes, settings,
                       extra_layers=layout.num_extra_layers)  # fmt: skip
    peak = rank_step_of(said.plan(model, machine)).peak_bytes
    given = said.plan(model, with_memory(machine, peak))
    ours = own_plan(given, SEARCH_S)
    seconds = time.process_time() - begin
    return {
        "model": row["model"], "pp": pp, "vpp": stages // pp, "gpus": f"{gpus} x {gpu}",
        "hand": str(layout), "ours": str(_layout(ours)), "hand_s": given.objective_s,
        "ours_s": ours.objective_s, "bound_s": ours.lower_bound_s, "gap": ours.gap,
        "hand_gb": peak / 1e9, "ours_gb": rank_step_of(ours).peak_bytes / 1e9,
        "planned_s": seconds, "why": reason(given, ours, ("the hand layout", "ours")),
    }  # fmt: skip


def _layout(plan: Plan) -> Any:
    return layout_of(plan.graph, [stage.blocks for stage in plan.stages])


def with_memory(machine: Machine, num_bytes: float) -> Machine:
    """Return a machine whose devices have so many bytes for a rank."""
    one = machine.devices[0]
    room = ceil(num_bytes * _SLACK) + one.reserved_bytes
    return replace(
        machine, devices=tuple(replace(device, memory_bytes=room) for device in machine.devices)
    )


# -- published pairs ----------------------------------------------------------------------------

_OUTCOMES = frozenset(
    ("id", "split", "tflops_per_gpu", "tokens_per_s_per_gpu", "tokens_per_s", "memory_gb",
     "samples_per_s_per_gpu", "step_seconds", "mfu_percent", "memory_of", "predicted_by_source",
     "note")
)  # fmt: skip


def pairs(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every two runs that differ in their split only, with both differences."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        key = json.dumps({k: v for k, v in row.items() if k not in _OUTCOMES}, sort_keys=True)
        groups.setdefault(key, []).append(row)
    for group in groups.values():
        priced = []
        for row in group if len({str(row["split"]) for row in group}) > 1 else []:
            try:
                run = read_run(row)
            except UnjudgedRowError as error:
                yield {"first": row["id"], "second": "", "reason": str(error)}
                continue
            if run.published_s is not None:
                priced.append((row, run.published_s, run.step_s()))
        for (one, one_s, one_p), (other, other_s, other_p) in combinations(priced, 2):
            if one["split"] != other["split"]:
                published, predicted = other_s / one_s - 1, other_p / one_p - 1
                yield {
                    "first": one["id"], "second": other["id"], "published": published,
                    "predicted": predicted, "right": same_sign(published, predicted),
                    "even": EVEN in (one["split"], other["split"]),
                }  # fmt: skip


def same_sign(published: float, predicted: float) -> bool:
    """Whether a difference has the published sign, or both are small."""
    if abs(published) < TIE:
        return abs(predicted) < 2 * TIE
    return published * predicted > 0


# -- text ---------------------------------------------------------------------------------------


def text(layouts: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> str:
    """Return both tables, and what is wrong."""
    rows = [
        (f"{row['model'][:22]} pp {row['pp']} x {row['vpp']}", row["gpus"],
         f"{row['hand_s'] * 1e3:.1f}", f"{row['ours_s'] * 1e3:.1f}",
         f"{row['hand_s'] / row['ours_s']:.3f}", f"{row['gap']:.1%}", f"{row['hand_gb']:.1f}",
         f"{row['ours_gb']:.1f}", f"{row['planned_s']:.1f}")
        for row in layouts
    ]  # fmt: skip
    columns = ("layout", "GPUs", "hand ms", "ours ms", "hand / ours", "gap", "hand GB", "ours GB",
               "CPU s")  # fmt: skip
    lines = [render_table(columns, rows)]
    for row in layouts:
        lines.append(f"{row['hand']}\n  ours {row['ours']}\n  {row['why']}")
    judged = sorted((p for p in found if "reason" not in p), key=lambda p: not p["even"])
    table = [
        (f"{p['first']} -> {p['second']}"[-100:], f"{p['published']:+.1%}",
         f"{p['predicted']:+.1%}", "yes" if p["right"] else "NO")
        for p in judged
    ]  # fmt: skip
    lines.append(render_table(("first -> second run", "published", "predicted", "right"), table))
    for even, name in ((True, "even against redistributed"), (False, "two ways to redistribute")):
        own = [pair["right"] for pair in judged if pair["even"] is even]
        lines.append(f"{name}: {sum(own)} of {len(own)} signs are right")
    lines += [f"not judged: {p['first']}: {p['reason']}" for p in found if "reason" in p]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", type=Path, default=HAND, help="the hand layouts")
    parser.add_argument("--rows", type=Path, default=SHARED, help="the published runs")
    parser.add_argument("--only", choices=("layouts", "pairs"), help="one of the two parts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    hand = json.loads(given.layouts.read_text(encoding="utf-8"))["rows"]
    raw = json.loads(given.rows.read_text(encoding="utf-8"))
    rows = raw["rows"] if isinstance(raw, dict) else raw
    layouts = [] if given.only == "pairs" else [compared(row) for row in hand]
    found = [] if given.only == "layouts" else list(pairs(rows))
    shown = json.dumps({"layouts": layouts, "pairs": found}, indent=1)
    print(shown if given.json else text(layouts, found))


if __name__ == "__main__":
    main()
