"""A spread vocabulary against what was published: flat, and as high; and where the solver picks it.

Source of the figures: Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism
(arXiv 2411.05288), table 5 (16 and 32 GPUs), and the results that its repository ships (8 GPUs,
sail-sg/VocabularyParallelism at 71f0727, artifact): MFU with the one barrier of algorithm 2, of
algorithm 1 where the other one is not listed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ipu_pipeline as ipp
from benchmarks.gpu_runs import read_run
from ipu_pipeline.ir.plan import Plan

SIZES = {8: (32, 3072, 24), 16: (48, 4096, 32), 32: (64, 5120, 40)}
CURVES = {
    (8, 4096): {32768: 58.23, 65536: 58.22, 131072: 57.40, 262144: 56.61},
    (16, 2048): {32768: 48.90, 65536: 50.62, 131072: 50.46, 262144: 50.46},
    (16, 4096): {32768: 50.93, 131072: 50.68, 262144: 50.90},
    (32, 2048): {32768: 45.85, 65536: 45.86},
    (32, 4096): {32768: 46.23, 65536: 46.35},
}


def predicted(gpus: int, seq: int, vocab: int, published: float) -> float:
    """Return the predicted MFU in per cent."""
    layers, hidden, heads = SIZES[gpus]
    row = {
        "id": "curve", "source": "arXiv 2411.05288", "quality": "A", "model": f"GPT {gpus}",
        "layers": layers, "hidden": hidden, "heads": heads, "kv_heads": heads, "ffn": 4 * hidden,
        "vocab": vocab, "seq": seq, "gpu": "A100-80GB", "gpus": gpus, "tp": 1, "pp": gpus,
        "dp": 1, "cp": 1, "schedule": "1F1B", "micro_batch": 1, "microbatches": 128,
        "global_batch": 128, "precision": "mixed", "recompute": "none", "note": "Vocab-2",
        "split": "even layers, vocabulary layers spread over all stages",
        "mfu_percent": published,
    }  # fmt: skip
    run = read_run(row)
    assert run.published_s is not None
    return published * run.published_s / run.step_s()


def check_curve(gpus: int, seq: int, vocabularies: Any) -> None:
    curve = CURVES[gpus, seq]
    found = {size: predicted(gpus, seq, size, curve[size]) for size in vocabularies}
    assert max(found.values()) <= 1.05 * min(found.values()), found
    assert found == pytest.approx({size: curve[size] for size in found}, rel=0.05)


def test_eight_gpus_are_flat_and_as_published() -> None:
    check_curve(8, 4096, (32768, 262144))


@pytest.mark.acceptance
@pytest.mark.parametrize("pipeline", CURVES)
def test_all_curves_are_flat_and_as_published(pipeline: tuple[int, int]) -> None:
    check_curve(*pipeline, CURVES[pipeline])


@cache
def model_of(vocab: int, layers: int) -> tuple[Any, Any]:
    config = LlamaConfig(
        hidden_size=3072, num_hidden_layers=layers, num_attention_heads=24,
        num_key_value_heads=24, intermediate_size=12288, vocab_size=vocab,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        tokens = torch.zeros(1, 2048, dtype=torch.long)
    return model.train(), {"input_ids": tokens, "labels": tokens}


def planned(vocab: int, layers: int, stages: int, vocabulary: str | None = "auto") -> Plan:
    model, batch = model_of(vocab, layers)
    return ipp.plan(model, batch, machine="a100-80g-x8", num_stages=stages, replicas=1,
                    microbatches=32, vocabulary=vocabulary)  # type: ignore[arg-type] # fmt: skip


@pytest.mark.acceptance
def test_it_is_picked_where_it_pays_only() -> None:
    assert planned(8192, 32, 2).vocabulary is None  # 16 layers a stage
    large = planned(262_144, 8, 4)
    assert large.vocabulary is not None
    assert large.objective_s < 0.8 * planned(262_144, 8, 4, None).objective_s
    assert large.gap < 0.1
