"""What a rank computes, keeps and exchanges, against formulas of papers and the cost model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu_attention import CoreAttentionPricer
from benchmarks.gpu_step import ZERO_BUBBLE_2P, PublishedStep, total_of
from ipu_pipeline.backends.cluster.backend import BACKEND
from ipu_pipeline.backends.cluster.prices.parallel_sizes import ParallelSizes, RankEngine
from ipu_pipeline.backends.cluster.prices.rank import (
    RankBlock,
    RankParameters,
    RankPricer,
)
from ipu_pipeline.capture import capture
from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.planner.backend import Workload
from ipu_pipeline.planner.options.block_cost import gradient_bytes

TOKENS, HIDDEN, HEADS = 512, 256, 4
MEGATRON = RankEngine(fused=True, dropout=True)
H100 = machine_by_name("h100-x16")


def captured(model_type: str, **sizes: object) -> BlockGraph:
    config = AutoConfig.for_model(
        model_type, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN, vocab_size=1000, **sizes,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": tokens}
    return capture(model.train(), batch, self_check=False).graph


@pytest.fixture(scope="module")
def gpt() -> BlockGraph:
    """Layer norms, an MLP without gate."""
    return captured("starcoder2", num_key_value_heads=HEADS, sliding_window=None)


@pytest.fixture(scope="module")
def mixture() -> BlockGraph:
    return captured("mixtral", num_key_value_heads=2, num_local_experts=8)


def layer(graph: BlockGraph) -> Block:
    return [block for block in graph.blocks if block.kind == "layer"][1]


def rank(graph: BlockGraph, engine: RankEngine = MEGATRON, **sizes: object) -> RankPricer:
    return RankPricer(graph, H100, ParallelSizes(**sizes), engine)  # type: ignore[arg-type]


def test_a_fused_layer_keeps_what_korthikanti_counts(gpt: BlockGraph) -> None:
    stream = TOKENS * HIDDEN
    found = rank(gpt).block(layer(gpt)).saved_bytes / 1.04
    assert found == pytest.approx(34 * stream + 4 * HEADS * TOKENS)
    unfused = CoreAttentionPricer(gpt, H100, ParallelSizes(), MEGATRON)
    found = unfused.block(layer(gpt)).saved_bytes / 1.04
    assert found == pytest.approx(34 * stream + 5 * HEADS * TOKENS**2)


def test_quantized_layers_keep_what_products_read_in_fewer_bytes(gpt: BlockGraph) -> None:
    plain = rank(gpt).block(layer(gpt)).saved_bytes
    quantized = rank(gpt, RankEngine(fused=True, dropout=True, precision="float8"))
    # Results of two norms, of attention and of the activation: 7 of the 34 bytes.
    less = plain - quantized.block(layer(gpt)).saved_bytes
    assert less == pytest.approx(1.04 * 7 * TOKENS * HIDDEN)


def test_an_eager_rank_alone_is_what_the_cluster_backend_plans_with(gpt: BlockGraph) -> None:
    costs = BACKEND.costs(Workload(gpt, H100, "1f1b", 8))
    pricer = rank(gpt, RankEngine())
    for block in gpt.blocks:
        if block.kind == "loss" or block.name not in costs.blocks:
            continue
        mine, plain = pricer.block(block), costs.blocks[block.name].plain
        adding_s = pricer.roofline.accumulation_s(gradient_bytes(gpt, block))
        assert mine.forward_s == pytest.approx(plain.forward_s)
        assert mine.backward_s + adding_s == pytest.approx(plain.backward_s)
    updated = pricer.update_s(pricer.parameters(layer(gpt)))
    assert updated > 0
    assert costs.update_s[layer(gpt).name] == pytest.approx(updated)


def test_ranks_share_products_and_what_is_kept(gpt: BlockGraph) -> None:
    one, four = rank(gpt).block(layer(gpt)), rank(gpt, tp=4).block(layer(gpt))
    assert four.saved_bytes == pytest.approx(one.saved_bytes / 4)
    assert four.parameters.dense == pytest.approx(one.parameters.dense / 4)
    hidden = RankEngine(fused=True, tensor_overlap=1.0)
    shown = rank(gpt, RankEngine(fused=True), tp=4).block(layer(gpt))
    assert rank(gpt, hidden, tp=4).block(layer(gpt)).forward_s < shown.forward_s


def test_experts_are_shared_by_expert_parallel_ranks(mixture: BlockGraph) -> None:
    one = rank(mixture, dp=8).block(layer(mixture)).parameters
    eight = rank(mixture, dp=8, ep=8).block(layer(mixture)).parameters
    assert one.experts == 8 * 3 * HIDDEN * 4 * HIDDEN
    assert eight == RankParameters(one.dense, one.experts / 8)
    # Rows for all experts, their wide tensors, and no copies of weights: two experts a token.
    inner = 2 * TOKENS * HIDDEN * (1 + 8 + 4) + TOKENS * (HIDDEN * 3 + 8)
    kept = rank(mixture, RankEngine(fused=True)).block(layer(mixture)).saved_bytes / 1.04
    norms_and_rows = 2 * 2 * 2 * TOKENS * HIDDEN + 4 * HEADS * TOKENS
    assert kept == pytest.approx(2 * inner + norms_and_rows, rel=0.02)


def test_every_expert_of_a_rank_has_launches_of_its_own(mixture: BlockGraph) -> None:
    fp8 = RankEngine(fused=True, precision="float8")

    def launched(machine: str, ep: int, engine: RankEngine) -> int:
        pricer = RankPricer(mixture, machine_by_name(machine), ParallelSizes(dp=8, ep=ep), engine)
        found = pricer._operations(layer(mixture), backward=False)
        return sum(op.count for op in found if op.name == "fused.launches")

    # Two products of eight experts; blocks without scales in hardware take more for each.
    assert launched("h100-x8", 1, RankEngine(fused=True)) == 2 * 8 * 8
    assert launched("b200-x8", 4, fp8) == 2 * 2 * 8
    assert launched("h100-x8", 4, fp8) == 2 * 2 * 28
    assert launched("h100-x8", 4, RankEngine()) == 0


def test_recomputation_trades_bytes_for_seconds(gpt: BlockGraph, mixture: BlockGraph) -> None:
    plain = rank(gpt).block(layer(gpt))
    full = rank(gpt, recompute=("full",)).block(layer(gpt))
    assert full.saved_bytes == 2 * TOKENS * HIDDEN
    assert full.backward_s == pytest.approx(plain.backward_s + plain.forward_s)
    part = rank(gpt, recompute=("mlp", "layernorm")).block(layer(gpt))
    assert full.saved_bytes < part.saved_bytes < plain.saved_bytes
    assert plain.backward_s < part.backward_s < full.backward_s
    kept = rank(mixture).block(layer(mixture)).saved_bytes
    assert rank(mixture, recompute=("moe_act",)).block(layer(mixture)).saved_bytes < kept


def test_state_is_sharded_by_zero_stage(gpt: BlockGraph) -> None:
    held = RankParameters(dense=1000.0, frozen=10.0)
    bytes_of = [rank(gpt, dp=4, zero_stage=z).state_bytes(held) for z in range(4)]
    assert bytes_of == [18_020, 9_020, 6_020, 4_520]
    assert rank(gpt, dp=4).reduction_s(held) > rank(gpt).reduction_s(held) == 0.0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, "tp must be at least 1, got 0"),
        ({"zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3, got 4"),
        ({"ep": 3, "dp": 4}, r"ep 3 does not divide the 4 ranks of a stage \(dp 4 x cp 1 x tp 1\)"),
    ],
)
def test_wrong_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelSizes(**sizes)


def test_a_step_replays_the_schedule_and_counts_what_is_in_flight(gpt: BlockGraph) -> None:
    block = RankBlock(1.0, 2.0, 1e9, 0.0, RankParameters(dense=1.0))
    pricer = rank(gpt, pp=4)
    step = PublishedStep.of(pricer, (block,) * 4, "1f1b", 8)
    assert step.step_s() == pytest.approx((8 + 3) * 3.0, rel=1e-3)
    kept = [round(b / 1e9 - 0.4) for b in step.memory_bytes()]
    assert kept == [4, 3, 2, 1]
    more = PublishedStep.of(pricer, (block,) * 4, "1f1b", 8, more_in_flight=1)
    assert [round(b / 1e9 - 0.4) for b in more.memory_bytes()] == [5, 4, 3, 2]
    none = PublishedStep.of(pricer, (block,) * 4, ZERO_BUBBLE_2P, 8)
    assert none.step_s() == pytest.approx(8 * 3.0, rel=1e-3)
    assert round(none.memory_bytes()[0] / 1e9 - 0.4) == 8
    half = total_of([(block, 0.5), (block, 0)])
    # Ranks visit their stages in turn: the bytes of all add up as they are alive together.
    looped = PublishedStep.of(rank(gpt, pp=4, vpp=2), (half,) * 8, "interleaved", 8)
    assert looped.step_s() < step.step_s()
    assert looped.memory_bytes()[0] / 1e9 - 0.4 == pytest.approx(0.5 * (4 + 2 * 3 + 1))


def test_a_fused_loss_holds_the_logits_and_their_gradient_in_16_bits(gpt: BlockGraph) -> None:
    plain = rank(gpt, RankEngine(fused=True))
    fused = rank(gpt, RankEngine(fused=True, fused_loss=True), tp=2)
    for block in gpt.blocks:
        if block.kind in ("head", "loss"):
            found = fused.block(block)
            assert (found.saved_bytes, found.workspace_bytes) == (0.0, 4 * TOKENS * 1000 / 2)
            assert found.forward_s < plain.block(block).forward_s


def test_stages_in_a_v_are_on_the_ranks_where_the_schedule_places_them(gpt: BlockGraph) -> None:
    pricer = rank(gpt, pp=2, vpp=2)
    stages = tuple(RankBlock(0.01, 0.02, 1e9 * (n + 1)) for n in range(4))
    step = PublishedStep.of(pricer, stages, "zbv", 8)
    assert step.shape.devices == (0, 1, 1, 0)
    assert step.step_s() < PublishedStep.of(pricer, stages, "interleaved", 8).step_s()
    used = PublishedStep.of(pricer, stages, "zbv", 8, reserved_share=1.5).memory_bytes()
    assert used == pytest.approx([1.5 * one for one in step.memory_bytes()])
