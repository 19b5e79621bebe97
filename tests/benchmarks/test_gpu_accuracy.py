"""The benchmark of GPU prices: reading of rows and layouts, and a few runs from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_accuracy
from benchmarks.gpu_fit import FITTED_ROWS, fit
from benchmarks.gpu_models import captured_layers
from benchmarks.gpu_rows import Chunk, UnjudgedRowError, chunks_of_layout, measured_s, read_row
from benchmarks.gpu_runs import read_run, runs_as_one_graph, step_flops

SELECTED = ("core_attn", "moe_act", "layernorm")
ROW: dict[str, Any] = {
    "id": "toy", "source": "somewhere@1: table 1", "quality": "A", "model": "GPT 1B", "layers": 6,
    "hidden": 1024, "heads": 8, "kv_heads": 8, "ffn": 4096, "vocab": 32000, "seq": 512,
    "gpu": "A100-80GB", "gpus": 8, "tp": 2, "pp": 2, "dp": 2, "micro_batch": 1,
    "global_batch": 16, "precision": "BF16", "schedule": "1F1B", "split": "even layers",
    "recompute": "none", "tokens_per_s_per_gpu": 9000.0, "memory_gb": 4.0,
    "memory_of": "largest GPU",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("Et*2|(t*2|)*34,t*3|(t*2|)*3,tL", [2] * 35 + [3] + [2] * 3 + [1]),
        ("Et*4|(t*4|)*14tmL", [4] * 15 + [1]),
        ("Et*16|t*16|t*16|t*13mL", [16, 16, 16, 13]),
        ("Et|t||tttt|ttttmL", [1, 1, 0, 4, 4]),
    ],
)
def test_layouts_of_megatron(text: str, layers: list[int]) -> None:
    chunks = chunks_of_layout(text)
    assert [chunk.layers for chunk in chunks] == layers
    assert chunks[0].embedding == chunks[-1].head == 1.0
    assert chunks[-1].extra == text.count("m")


def test_what_is_no_layout_has_no_stages() -> None:
    assert chunks_of_layout("Et|t)L") == chunks_of_layout("even layers | one less") == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quality": "C (batch not stated)"}, "not stated"),
        ({"gpus": None, "dp": None}, "the number of GPUs is not stated"),
        ({"gpus": 6}, "tp x pp x cp = 4 does not divide 6 GPUs"),
        ({"gpu": "TPU v4"}, "GPU 'TPU v4' is not described"),
        ({"global_batch": None}, "no global batch"),
        ({"ep": 3}, "ep 3 does not divide the 4 ranks"),
        ({"seq": None}, "the sequence length is not stated"),
        ({"layers": 1, "pp": 4, "gpus": 8}, "1 layers are less than its 4 stages"),
        ({"precision": "fp32"}, "precision 'fp32' has no price here"),
        ({"heads": 7}, "hidden 1024 does not divide into 7 heads"),
        ({"layers": None}, "model 'GPT 1B' .* is not known here and the row gives no sizes"),
        ({"tp": "two"}, "tp is 'two', which is no number"),
        ({"micro_batch": 1.5}, "micro_batch is 1.5, which is not whole"),
        ({"ep": 4}, "experts of 'GPT 1B', which the row does not describe"),
        ({"tokens_per_s_per_gpu": None, "memory_gb": None}, "no speed was published"),
    ],
)
def test_rows_that_say_too_little_are_listed_with_the_reason(
    change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnjudgedRowError, match=reason):
        read_run({**ROW, **change})


def test_seconds_come_from_whatever_was_published() -> None:
    run = read_run(ROW)
    per_token = 6 * (24 * 1024**2 + 4 * 512 * 1024) + 2 * 1024 * 32000
    flops = 3 * per_token * 16 * 512
    assert step_flops(run.row, run.model) == pytest.approx(flops)
    silent = {**ROW, "tokens_per_s_per_gpu": None}
    for change, seconds in (
        ({"step_seconds": 0.5}, 0.5),
        ({"tokens_per_s_per_gpu": 9000.0}, 16 * 512 / 72000),
        ({"tokens_per_s": 72000.0}, 16 * 512 / 72000),
        ({"samples_per_s_per_gpu": 2.0}, 1.0),
        ({"samples_per_s": 16.0}, 1.0),
        ({"tflops_per_gpu": 100.0}, flops / 8e14),
        ({"mfu_percent": 50.0}, flops / (8 * 0.5 * 989e12)),
    ):
        found = measured_s(read_row({**silent, **change}), flops, 989e12)
        assert found == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"gpus": None}, {"dp": 2}),
        ({"micro_batch": None, "microbatches": 4}, {"micro_batch": 2, "microbatches": 4}),
        ({"micro_batch": None, "source": "pytorch/torchtitan@1"}, {"microbatches": 2}),
        ({"global_batch": None, "note": "local batch 4"}, {"microbatches": 4}),
        ({"global_batch": 15}, {"microbatches": 8}),
        ({"schedule": "Interleaved 1F1B"}, {"vpp": 2, "schedule": "interleaved"}),
        ({"schedule": "ZBV"}, {"vpp": 2, "schedule": "zbv"}),
        ({"schedule": "DualPipeV", "vpp": 2}, {"schedule": "dualpipev"}),
        ({"schedule": "ZB-H1"}, {"schedule": "interleaved_zero_bubble"}),
        ({"schedule": "AFAB (GPipe)"}, {"schedule": "gpipe"}),
        ({"schedule": None, "vpp": 3}, {"schedule": "interleaved"}),
        ({"precision": "NVFP4"}, {"precision": "float4"}),
        ({"precision": "float8 rowwise"}, {"precision": "float8"}),
        ({"precision": None}, {"precision": "bfloat16"}),
        ({"recompute": "full, every layer"}, {"recompute": ("full",)}),
        ({"recompute": "selective (layernorm, moe_act)"}, {"recompute": SELECTED}),
        ({"recompute": None}, {"recompute": ()}),
        ({"gpus": "1,024", "tp": 2.0, "vpp": "n/a", "global_batch": "2,048"}, {"dp": 256}),
        ({"gpu": "AMD Instinct MI300X 192 GB"}, {"machine": "mi300x-x8"}),
        ({"gpu": "NVIDIA GH200 96GB"}, {"machine": "gh200-x8"}),
        ({"recompute": "AC full"}, {"recompute": ("full",)}),
        ({"recompute": "no activation checkpointing"}, {"recompute": ()}),
        ({"schedule": "interleaved-1F1B"}, {"vpp": 2}),
        ({"schedule": "GPipe", "pp": 1}, {"schedule": "1f1b"}),
        ({"note": "DeepSpeed ZeRO-2"}, {"zero_stage": 2}),
        ({"schedule": "FSDP2", "pp": 1}, {"zero_stage": 3}),
        ({"schedule": "1F1B with FSDP"}, {"zero_stage": 1}),
    ],
)
def test_rows_are_read_however_the_format_allows(
    change: dict[str, Any], found: dict[str, Any]
) -> None:
    row = read_row({**ROW, **change})
    for name, value in found.items():
        assert getattr(row, name, getattr(row.sizes, name, None)) == value, name


@pytest.mark.parametrize(
    ("named", "billions"),
    [
        ({"model": "Mixtral 8x22B"}, 141),
        ({"model": "DeepSeek V2"}, 236),
        ({"hf_id": "meta-llama/Llama-3.1-8B"}, 8.0),
        ({"model": "Grok1", "layers": 32}, 159),
    ],
)
def test_well_known_models_have_their_sizes(named: dict[str, Any], billions: float) -> None:
    silent = dict.fromkeys(("layers", "hidden", "heads", "kv_heads", "ffn", "vocab"))
    model = captured_layers(read_row({**ROW, **silent, **named}))
    elements = model.graph.parameter_by_fqn
    held = [sum(elements[fqn].numel for fqn in model.layer(n).parameters) for n in (0, 1)]
    ends = [fqn for block in model.blocks("embedding", "head") for fqn in block.parameters]
    total = model.dense_layers * held[0] + (model.num_layers - model.dense_layers) * held[1]
    total += sum(elements[fqn].numel for fqn in ends)
    assert total / 1e9 == pytest.approx(billions, rel=0.02)


RECIPE = {"from_recipe_at_head": "qwen3_fp8mx_config", "same_parallel_settings": True}


def test_a_recipe_with_one_graph_does_not_wait_for_its_host() -> None:
    made = {"model": "Qwen3_30B_a3B", "hf_id": "Qwen/Qwen3-30B-A3B", "precision": "MXFP8",
            "gpu": "GB300", "ep": 4, "recompute": RECIPE}  # fmt: skip
    before, after = (read_run({**ROW, **made, "note": f"release {n}"}) for n in ("26.04", "26.06"))
    assert runs_as_one_graph(after.row.raw)
    assert not runs_as_one_graph({**after.row.raw, "model": "Kimi_K2"})
    device = after.pricer.machine.devices[0]
    assert device.host_sync_s == device.op_overhead_s == 0
    assert after.step_s() < before.step_s()


def test_experts_with_a_capacity_wait_for_no_host_and_send_every_copy() -> None:
    made = {"model": "Qwen3_30B_a3B", "hf_id": "Qwen/Qwen3-30B-A3B", "precision": "FP8",
            "gpu": "H100", "ep": 4, "seq": 4096}  # fmt: skip
    waits, drops = (read_run({**ROW, **made, "note": note}) for note in ("", "tokendrop"))
    names = [[op.name for op in run.pricer._operations(run.model.layer(1), backward=True)]
             for run in (waits, drops)]  # fmt: skip
    assert "fused.launches" in names[0]
    assert "fused.launches" not in names[1]
    layer, host_s = waits.model.layer(1), waits.machine.devices[0].host_sync_s
    assert drops.pricer.exchanged_s(layer) > waits.pricer.exchanged_s(layer) - host_s > 0
    assert drops.step_s() < waits.step_s()


def test_a_later_recipe_that_does_not_fit_is_not_what_ran() -> None:
    big = {**ROW, "hidden": 8192, "heads": 64, "kv_heads": 64, "ffn": 32768, "layers": 16,
           "tp": 1, "gpus": 8, "dp": 4, "pp": 2, "micro_batch": 8, "seq": 4096,
           "global_batch": 128}  # fmt: skip
    gb = {"gpu": "GB300", "micro_batch": 16}
    stated = read_run({**big, "gpu": "H100"})
    silent = read_run({**big, "gpu": "H100", "recompute": None})
    h100, gb300 = (
        read_run({**big, "recompute": RECIPE, **change}) for change in ({"gpu": "H100"}, gb)
    )
    assert not stated.fits()
    assert stated.row.sizes.recompute == ()
    assert h100.row.sizes.recompute == silent.row.sizes.recompute == ("full",)
    assert "its recomputation is not stated" in silent.row.assumptions[-1]
    assert "a later commit's recipe: full recomputed" in h100.row.assumptions[-1]
    assert gb300.fits()
    assert gb300.on_device == 0.5


@pytest.mark.parametrize(
    ("split", "layers", "ends"),
    [
        ("even layers", [3, 3], (1.0, 1.0)),
        ("even layers, vocabulary layers spread over all stages", [3, 3], (0.5, 0.5)),
        ("first and last stage have one layer fewer", [3, 3], (1.0, 1.0)),
        ("layers moved by estimated compute", [4, 2], (1.0, 1.0)),
        ("Et*4|t*2L", [4, 2], (1.0, 1.0)),
        ("hand-made: 5 layers, then 1", [5, 1], (1.0, 1.0)),
    ],
)
def test_splits_as_they_are_described(
    split: str, layers: list[int], ends: tuple[float, float]
) -> None:
    chunks = read_run({**ROW, "split": split}).chunks
    assert [chunk.layers for chunk in chunks] == layers
    assert (chunks[0].embedding, chunks[-1].head) == ends
    assert isinstance(chunks[0], Chunk)


def test_a_layout_of_another_number_of_stages_is_an_assumption() -> None:
    run = read_run({**ROW, "split": "Et*2|t*2|t*2L"})
    assert [chunk.layers for chunk in run.chunks] == [3, 3]
    assert "its layout is of another model or number of stages" in run.row.assumptions[0]
    hanayo = read_row({**ROW, "schedule": "Hanayo"})
    assert hanayo.assumptions == ("schedule 'hanayo' has no price here: 1f1b",)
    one = {**ROW, "pp": 1, "dp": 4, "split": "layers moved by estimated compute"}
    assert [chunk.layers for chunk in read_run(one).chunks] == [6]


def test_the_report_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ROW, {**ROW, "id": "other", "gpu": "H100", "tp": 1, "dp": 4, "precision": "FP8"},
            {**ROW, "id": "silent", "quality": "C"}, {"id": "empty", "quality": "A"}]  # fmt: skip
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": rows}))
    gpu_accuracy.main(["--rows", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(gpu_accuracy.SUMMARY) <= set(found)
    assert (found["judged"], found["refused_share"], found["settings_inferred"]) == (2, 0.0, 0)
    assert [row["id"] for row in found["not_judged"]] == ["silent", "empty"]
    assert found["leave_one_source_out"]["somewhere"]["rows"] == 2
    by_id = {row["id"]: row for row in found["rows"]}
    assert by_id["other"]["predicted_s"] < by_id["toy"]["predicted_s"]
    gpu_accuracy.main(["--rows", str(path), "--no-leave-out"])
    shown = capsys.readouterr().out
    assert "not judged: silent: batch, sequence or schedule" in shown
    assert "not judged: empty: the number of GPUs is not stated" in shown
    gpu_accuracy.main(["--rows", str(tmp_path / "none.json")])
    assert "skipped: there is no file" in capsys.readouterr().out


def test_few_rows_are_fitted_and_a_fit_finds_the_share() -> None:
    assert len(FITTED_ROWS) <= 21
    run = read_run(ROW)
    kernels = run.machine.devices[0].kernels
    assert kernels is not None
    share = kernels.product_share["bfloat16"]
    found = fit([read_run({**ROW, "tokens_per_s_per_gpu": None, "step_seconds": run.step_s()})])
    assert found == {("ampere", "bfloat16"): pytest.approx(share, rel=1e-3)}
