"""The thirteen architectures: captured whole, at every granularity, loss and gradients equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ipu_pipeline.capture import capture
from ipu_pipeline.capture.check import altered
from ipu_pipeline.ir.graph import BlockGraph
from tests.capture.toys import assert_replays
from tests.later import in_turn, one_in
from tests.tiny_models import TINY
from tests.versions import OLDER

GRANULARITIES = ("layer", "sublayer", "op")


@pytest.mark.parametrize(("name", "granularity"), in_turn(TINY, GRANULARITIES))
def test_equal_to_the_model_on_other_data(name: str, granularity: str) -> None:
    if OLDER and (name, granularity) == ("deberta-v2", "op"):
        pytest.skip("its attention is compiled by torch.jit.script before transformers 5.21")
    model, batch = TINY[name].build()
    keys = list(model.state_dict())
    captured = capture(model, batch, granularity=granularity, self_check=False)
    assert_replays(model, captured, altered(batch))
    assert list(model.state_dict()) == keys


def names_and_kinds(graph: BlockGraph) -> list[tuple[str, str]]:
    return [(block.name, block.kind) for block in graph.blocks]


EXPECTED = {
    "bert-qa": [
        ("bert.embeddings", "embedding"),
        *((f"bert.encoder.layer.{i}", "layer") for i in range(4)),
        ("qa_outputs", "head"), ("loss", "loss"),
    ],
    "gpt2-lm": [
        ("transformer.wte", "embedding"), ("transformer.wpe", "embedding"),
        *((f"transformer.h.{i}", "layer") for i in range(4)),
        ("lm_head", "head"), ("loss", "loss"),
    ],
    "t5": [
        ("encoder.embed_tokens", "embedding"),
        ("encoder.block.0", "layer"), ("encoder.block.1", "layer"),
        ("decoder.embed_tokens", "embedding"),
        ("decoder.block.0", "layer"), ("decoder.block.1", "layer"),
        ("lm_head", "head"), ("loss", "loss"),
    ],
    "lxmert-qa": [
        ("lxmert.embeddings", "embedding"),
        ("lxmert.encoder.visn_fc", "embedding"),
        ("lxmert.encoder.layer.0", "layer"), ("lxmert.encoder.layer.1", "layer"),
        ("lxmert.encoder.r_layers.0", "layer"), ("lxmert.encoder.r_layers.1", "layer"),
        ("lxmert.encoder.x_layers.0", "layer"), ("lxmert.encoder.x_layers.1", "layer"),
        ("lxmert.pooler", "head"), ("answer_head", "head"), ("loss", "loss"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_are_pinned(name: str) -> None:
    model, batch = TINY[name].build()
    assert names_and_kinds(capture(model, batch).graph) == EXPECTED[name]


def test_lxmert_has_two_streams_that_meet() -> None:
    model, batch = TINY["lxmert-qa"].build()
    graph = capture(model, batch).graph
    edges = {(source, sink) for source, sink, _ in graph.edges()}
    assert ("lxmert.embeddings", "lxmert.encoder.layer.0") in edges
    assert ("lxmert.encoder.visn_fc", "lxmert.encoder.r_layers.0") in edges
    meeting = {source for source, sink in edges if sink == "lxmert.encoder.x_layers.0"}
    assert meeting == {"lxmert.encoder.layer.1", "lxmert.encoder.r_layers.1"}
    between = [t for s, k, t in graph.edges() if k == "lxmert.encoder.x_layers.1"]
    assert sorted(t.shape for t in between) == [(2, 16, 32), (2, 36, 32)]


def test_t5_encoder_output_reaches_every_decoder_layer() -> None:
    model, batch = TINY["t5"].build()
    graph = capture(model, batch).graph
    output = next(t for t in graph.tensors if t.consumers == ("decoder.block.0", "decoder.block.1"))
    assert output.producer == "encoder.block.1"
    assert graph.tied_groups == (("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),)


def test_tied_bert_mlm_lists_the_shared_parameter_once() -> None:
    model, batch = TINY["bert-mlm"].build()
    graph = capture(model, batch).graph
    word = graph.parameter_by_fqn["bert.embeddings.word_embeddings.weight"]
    assert word.aliases == ("cls.predictions.decoder.weight",)
    assert len(word.blocks) == 2
    assert graph.tied_groups == (word.blocks,)
    assert sum(p.numel for p in graph.parameters) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", one_in(3, TINY))
def test_every_parameter_is_in_some_block(name: str) -> None:
    model, batch = TINY[name].build()
    graph = capture(model, batch, self_check=False).graph
    listed = {parameter.fqn for parameter in graph.parameters}
    loss = model(**batch).loss
    loss.backward()
    used = {fqn for fqn, parameter in model.named_parameters() if parameter.grad is not None}
    assert used <= listed
    for parameter in graph.parameters:
        assert parameter.shape == tuple(model.get_parameter(parameter.fqn).shape)
        assert parameter.blocks


def test_equal_blocks_have_equal_operation_counts() -> None:
    model, batch = TINY["bert-qa"].build()
    layers = [block for block in capture(model, batch).graph.blocks if block.kind == "layer"]
    assert len({(b.forward_ops, b.backward_ops, b.saved_bytes) for b in layers}) == 1
    assert layers[0].forward_flops > 0
    linear = [sum(op.flops * op.count for op in ops if "attention" not in op.name)
              for ops in (layers[0].forward_ops, layers[0].backward_ops)]  # fmt: skip
    assert linear[1] == 2 * linear[0]
    assert layers[0].saved_bytes > 0


def test_masks_are_recomputed_and_not_sent() -> None:
    model, batch = TINY["bert-qa"].build()
    captured = capture(model, batch)
    assert all(spec.dtype == "float32" for spec in captured.graph.tensors)
    program = captured.programs[-3]
    assert program.name == "bert.encoder.layer.3"
    prelude = captured.prelude([program])
    assert prelude.inputs == ("attention_mask",) or "attention_mask" in prelude.inputs
    values = {name: batch[name] for name in prelude.inputs}
    prelude.run(values)
    assert set(program.inputs) - set(values) == {captured.programs[-4].outputs[0]}


def test_evaluation_without_labels_returns_the_outputs() -> None:
    model, batch = TINY["bert-qa"].build()
    model.eval()
    inputs = {n: v for n, v in batch.items() if not n.endswith("_positions")}
    captured = capture(model, inputs)
    assert list(captured.results) == ["start_logits", "end_logits"]
    assert not captured.graph.training
    assert all(not block.backward_ops for block in captured.graph.blocks)
    with torch.no_grad():
        found, expected = captured.run(inputs), model(**inputs)
    assert torch.equal(found["start_logits"], expected.start_logits)
    assert torch.equal(found["end_logits"], expected.end_logits)


def test_inference_mode_around_the_capture_is_fine() -> None:
    model, batch = TINY["vit"].build()
    with torch.inference_mode():
        captured = capture(model.eval(), {"pixel_values": batch["pixel_values"]})
    assert list(captured.results) == ["logits"]


def test_programs_hold_the_models_own_parameters() -> None:
    model, batch = TINY["gpt2-lm"].build()
    own = {id(parameter) for parameter in model.parameters()}
    used: set[int] = set()
    for program in capture(model, batch).programs:
        parameters: list[Tensor] = list(program.module.parameters())
        assert {id(p) for p in parameters} <= own
        used |= {id(p) for p in parameters}
    assert used == own


def test_no_block_draws_random_numbers_without_dropout_and_layers_do_with_it() -> None:
    for dropout in (False, True):
        model, batch = TINY["bert-qa"].build(dropout=dropout)
        blocks = capture(model, batch).graph.blocks
        assert {b.name for b in blocks if b.uses_random} == (
            {b.name for b in blocks if b.kind in ("embedding", "layer")} if dropout else set()
        )
