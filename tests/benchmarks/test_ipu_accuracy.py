"""The accuracy of the IPU model on published systems (skipped where the shared files are not)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ipu_accuracy import accuracy, main, spearman, text
from benchmarks.ipu_architectures import architecture, capture_architecture
from benchmarks.ipu_fit import PRODUCTS, SHARED, fit, minimise, product_share
from benchmarks.ipu_observations import judged, load_observations, predict_row
from benchmarks.ipu_rows import UnjudgeableRowError, load_rows, read_row
from ipu_pipeline.backends.ipu.prices import DEFAULT_CALIBRATION, chip_named
from ipu_pipeline.backends.ipu.prices.layout import PlacedProgram
from ipu_pipeline.backends.ipu.prices.timing import step_time

pytestmark = pytest.mark.timeout(400)  # the models of all published rows are captured once

_is_here = pytest.mark.skipif(
    not (SHARED / "throughput.json").exists(),
    reason="the shared IPU files (../shared/data/ipu) are not here",
)


def needs_files(test: Any) -> Any:
    """Mark a test that judges all published rows: minutes on a slow machine."""
    return pytest.mark.acceptance(_is_here(test))


MODELS = {
    "BERT-base": "bert", "RoBERTa-large": "roberta", "DeBERTa-base": "deberta", "mT5-small": "mt5",
    "DistilBERT-base": "distilbert", "gpt2-medium": "gpt2", "GPT-J 6B": "gptj", "T5-base": "t5",
    "BART-base": "bart", "ViT-base/16": "vit", "DeiT-base": "deit", "BEiT-base": "beit",
    "HuBERT-base": "hubert", "wav2vec2-base (pretraining)": "wav2vec2", "Whisper-small": "whisper",
    "ConvNeXt-base": "convnext", "LXMERT-base": "lxmert", "SWIN_BASE_384": "swin",
    "nanoGPT 6L384h": "gpt2", "MPNet-base": "mpnet",
}  # fmt: skip


def _architecture(model: str, **more: Any):
    raw = {"model": model, "layers_per_ipu": [-1, -1], "task": "any", **more}
    return architecture(read_row(raw))


@pytest.mark.parametrize(("name", "model_type"), MODELS.items())
def test_published_names_are_transformers_models(name: str, model_type: str) -> None:
    assert _architecture(name).model_type == model_type


@pytest.mark.parametrize(
    ("name", "reason"),
    [("DINO vit_small", "teacher"), ("mini-DALL-E L16", "DALL-E"), ("GPT-3 175B", "GPT-3"),
     ("PopConv-Z9", "no transformers model type"), ("ResNeXt50_32x4d", "ResNeXt")],
)  # fmt: skip
def test_other_names_say_why(name: str, reason: str) -> None:
    with pytest.raises(UnjudgeableRowError, match=reason):
        _architecture(name)


def test_numbers_of_a_row_reach_the_config() -> None:
    found = dict(_architecture("BERT-large", arch={"vocab": 30400, "layers": 3}).numbers)
    assert (found["vocab_size"], found["num_hidden_layers"]) == (30400, 3)
    assert (found["hidden_size"], found["intermediate_size"]) == (1024, 4096)


def test_pretraining_heads_see_the_masked_tokens_only() -> None:
    arch = {"layers": 1, "seq_len": 128}
    row = {"task": "mlm+nsp pretraining", "arch": arch, "micro_batch_size": 2, "mask_tokens": 20}
    graph = capture_architecture(_architecture("BERT-base", **row))
    vocabulary = graph.parameter_by_fqn[graph.blocks[0].parameters[0]].shape[0]
    logits = [t for t in graph.tensors if t.shape[-1:] == (vocabulary,)]
    assert [tensor.shape for tensor in logits] == [(2 * 20, vocabulary)]
    assert graph.inputs[0].shape == (2, 128)


def test_an_untied_encoder_decoder_has_two_tables() -> None:
    wanted = _architecture("mT5-small", arch={"layers": 1, "decoder_layers": 1})
    graph = capture_architecture(wanted)
    tables = [p.blocks for p in graph.parameters if p.shape[0] == 250112]
    assert sorted(len(blocks) for blocks in tables) == [1, 2]


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == 1
    assert spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman([1], [1]) is None


def test_the_search_finds_a_minimum() -> None:
    found = minimise(lambda p: (p[0] - 1) ** 2 + 3 * (p[1] + 2) ** 2, [0.0, 0.0], 0.5, 80)
    assert found == pytest.approx([1, -2], abs=1e-3)


@pytest.mark.parametrize(("family", "product", "precision", "share"), PRODUCTS)
def test_published_matrix_products(family, product, precision, share) -> None:
    found = product_share(family, product, precision, DEFAULT_CALIBRATION)
    assert found == pytest.approx(share, rel=0.06)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return accuracy(
        SHARED / "known_good_configs.json", SHARED / "throughput.json",
        SHARED / "does_not_fit.json", leave_out=False,
    )  # fmt: skip


@needs_files
@pytest.mark.slow
def test_the_targets_on_the_shared_files(report: dict[str, Any]) -> None:
    assert report["mean_abs_error"] <= 0.08
    assert report["worst_abs_error"] <= 0.20
    assert report["spearman"] >= 0.98
    assert report["fits_share"] >= 0.98
    assert report["misfits_share"] >= 0.90


@needs_files
@pytest.mark.slow
def test_no_row_is_dropped(report: dict[str, Any]) -> None:
    sizes = {
        "throughput": len(load_rows(SHARED / "throughput.json")) - len(report["lower_bounds"]),
        "fits": len(load_rows(SHARED / "known_good_configs.json")),
        "misfits": len(load_rows(SHARED / "does_not_fit.json")),
    }
    for kind, size in sizes.items():
        rejected = report["not_judged"][kind]
        assert report["judged"][kind] + len(rejected) == size
        assert all(row["reason"] for row in rejected)
    assert report["judged"]["fits"] >= 150


@needs_files
@pytest.mark.slow
def test_the_lower_bounds_hold(report: dict[str, Any]) -> None:
    assert report["lower_bounds"]
    assert all(bound["holds"] and bound["limited_by"] for bound in report["lower_bounds"])


@needs_files
@pytest.mark.slow
def test_published_memory_of_each_ipu(report: dict[str, Any]) -> None:
    (found,) = [row for row in report["out_of_memory"] if "per_ipu_gib_published" in row]
    assert found["per_ipu_worst_abs_error"] <= 0.15


@needs_files
@pytest.mark.slow
def test_published_profiles_of_bert_large_inference() -> None:
    # hardware.json, memory_profiles: mem_bertl_inf_2way_a and _b (code taken from there, variables
    # and tiles not)
    rows = {row["id"]: row for row in load_rows(SHARED / "known_good_configs.json")}
    row = read_row(rows["ex_tf1_bert_squad_large_inference_2ipu_sdk2.5"])
    graph = capture_architecture(architecture(row))
    found, _ = predict_row(row, graph, chip_named("ipu-gc200"))
    totals = [memory.total_bytes for memory in found.memory]
    tiles = [memory.fullest_tile_bytes(found.chip) for memory in found.memory]
    assert totals == pytest.approx([470_821_068, 403_195_814], rel=0.03)
    assert tiles == pytest.approx([336_670, 291_170], rel=0.03)
    assert all(ours >= theirs for ours, theirs in zip(tiles, (336_670, 291_170), strict=True))


@needs_files
@pytest.mark.slow
def test_steps_of_larger_pods_that_were_not_fitted() -> None:
    # hardware.json, derived_calibrations: t_update = 4.41 ms * GA + 0.194 s on POD64 and POD128,
    # 0.360 s measured on POD256
    observations, _ = load_observations(
        SHARED / "known_good_configs.json", SHARED / "throughput.json"
    )
    (run,) = [o for o in observations if o.id == "mlperf_v2.0_graphcore_bert_pod16_closed"]
    for replicas, accumulation, seconds in ((8, 96, 0.617), (16, 64, 0.476), (32, 36, 0.360)):
        settings = replace(run.row.settings, replicas=replicas, accumulation=accumulation)
        step = step_time(PlacedProgram(run.graph, run.layout, settings, run.chip))
        assert step.total_s == pytest.approx(seconds, rel=0.05)


@needs_files
@pytest.mark.slow
def test_fitting_again_stays_where_it_is() -> None:
    observations, _ = load_observations(
        SHARED / "known_good_configs.json", SHARED / "throughput.json"
    )
    again = fit(judged(observations), DEFAULT_CALIBRATION, 12)
    for name, value in asdict(again).items():
        assert value == pytest.approx(getattr(DEFAULT_CALIBRATION, name), rel=0.1)


def _write(path: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (path / name).write_text(json.dumps(rows))
    return str(path / name)


@pytest.fixture
def small_files(tmp_path: Path) -> Callable[[], list[str]]:
    config = {
        "id": "c", "model": "BERT-base", "task": "squad", "layers_per_ipu": [0, 1], "head_ipu": 1,
        "arch": {"layers": 1, "seq_len": 128}, "gradient_accumulation": 8,
    }  # fmt: skip
    measured = {"id": "t", "config_id": "c", "throughput": 900.0, "quality": "A", "model": "b"}
    missing = {"id": "u", "config_id": "nothing", "throughput": 1.0, "quality": "A"}
    bound = {"id": "v", "config_id": "c", "throughput": 1.0, "quality": "C"}
    misfit = {"id": "m", "kind": "oom", "config": {**config, "micro_batch_size": 4096}}

    def arguments() -> list[str]:
        return [
            "--configs", _write(tmp_path, "c.json", [config]),
            "--throughput", _write(tmp_path, "t.json", [measured, missing, bound]),
            "--does-not-fit", _write(tmp_path, "m.json", [misfit, {"id": "n", "kind": "other"}]),
        ]  # fmt: skip

    return arguments


def test_any_files_of_the_format(small_files, capsys) -> None:
    main([*small_files(), "--json", "--no-leave-out"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits_share"] == found["misfits_share"] == 1.0
    assert found["judged"] == {"throughput": 1, "fits": 1, "misfits": 1}
    assert found["not_judged"]["throughput"] == [
        {"id": "u", "reason": "no configuration 'nothing'"}
    ]
    assert found["lower_bounds"][0]["holds"]
    assert found["spearman"] is None
    assert "mean_abs_error" in text(found)
