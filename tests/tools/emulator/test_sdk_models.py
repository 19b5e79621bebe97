"""Stock models of the SDK's transformers: refused where the real front end refuses them.

Source: POPTORCH_CONTRACT.md, sections 3 and 8 and the facts. Runs under ``make test-sdk`` only.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith("4.29."), reason="needs the SDK's transformers 4.29"
)
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
SEQUENCES = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
GPT = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
WHISPER = {**SEQUENCES, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
ITEM, SHAPE = "aten::item is only supported", "Type inference failed for aten::"


class Loss(nn.Module):
    """Returns the loss alone."""

    def __init__(self, poptorch, model):
        super().__init__()
        self.model = model
        self.mark = lambda loss: poptorch.identity_loss(loss, "none")

    def forward(self, **inputs):
        return self.mark(self.model(**inputs)[0])


def built(name, sizes):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**sizes))
    # Older attention modules keep caches, whose empty tensors no device has.
    model.config.use_cache = False
    return model.train()


def inputs_of(name):
    ids = torch.arange(16).view(2, 8) % 30 + 3
    if name.startswith("Whisper"):
        return {"input_features": torch.randn(2, 8, 32), "labels": ids}
    if name.endswith("QuestionAnswering"):
        at = torch.tensor([1, 2])
        return {"input_ids": ids, "start_positions": at, "end_positions": at}
    if name.startswith(("ViT", "ConvNext")):
        return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    ("name", "sizes", "half", "message"),
    [
        # float32: the masks of their decoders call torch.full(.., tensor).
        ("BartForConditionalGeneration", SEQUENCES, False, rf"{ITEM}.* in full\(\)"),
        ("BartForConditionalGeneration", SEQUENCES, True, ITEM),
        ("MBartForConditionalGeneration", SEQUENCES, True, ITEM),
        ("PegasusForConditionalGeneration", SEQUENCES, True, ITEM),
        ("WhisperForConditionalGeneration", WHISPER, True, ITEM),
        ("LlamaForCausalLM", SIZES, False, rf"{ITEM}.* in full\(\)"),
        ("GPTNeoXForCausalLM", SIZES, False, rf"{ITEM}.* in baddbmm\(\)"),
        (
            "GPTJForCausalLM",
            {**GPT, "rotary_dim": 4},
            False,
            rf"{SHAPE}repeat_interleave without output_size",
        ),
    ],
)
def test_refused(poptorch, name, sizes, half, message) -> None:
    model, inputs = built(name, sizes), inputs_of(name)
    if half:
        model = model.half()
        inputs = {k: v.half() if v.is_floating_point() else v for k, v in inputs.items()}
    executor = poptorch.trainingModel(Loss(poptorch, model))
    with pytest.raises(poptorch.Error, match=message) as caught:
        executor.compile(**inputs)
    assert "transformers/models/" in caught.value.message


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("BertForQuestionAnswering", SIZES),
        ("BertForMaskedLM", SIZES),
        ("RobertaForMaskedLM", SIZES),
        ("GPT2LMHeadModel", GPT),
        ("DistilBertForQuestionAnswering", {"dim": 16, "n_layers": 2, "n_heads": 2}),
        (
            "T5ForConditionalGeneration",
            {
                "vocab_size": 40,
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 32,
                "num_layers": 2,
                "num_heads": 2,
                "decoder_start_token_id": 0,
            },
        ),
        ("ViTForImageClassification", {**SIZES, "image_size": 32, "patch_size": 16}),
        ("ConvNextForImageClassification", {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}),
    ],
)
def test_held_up(poptorch, name, sizes) -> None:
    """Two steps of plain SGD equal the host's."""
    model, inputs = built(name, sizes).eval(), inputs_of(name)
    plain = built(name, sizes).eval()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    wrapped = Loss(poptorch, model)
    executor = poptorch.trainingModel(wrapped, None, poptorch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        loss = plain(**inputs)[0]
        assert executor(**inputs).item() == pytest.approx(loss.item(), rel=1e-6)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.data, theirs.data, rtol=1e-5, atol=1e-6, msg=key)
