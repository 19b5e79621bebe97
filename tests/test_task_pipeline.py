"""transformers' own pipelines over an executable give what they give over the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError
from tests.tiny_models import TINY

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "|", *(f"w{n}" for n in range(90))]
TEXTS = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w10"]
SOUND = np.sin(np.arange(4000) / 20).astype(np.float32)
IMAGE = (np.arange(30 * 30 * 3) % 251).reshape(30, 30, 3).astype(np.uint8)
_LABELS = {"num_labels": 3, "id2label": {0: "entailment", 1: "neutral", 2: "other"},
           "label2id": {"entailment": 0, "neutral": 1, "other": 2}}  # fmt: skip
_SPEECH = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (5, 4),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
}  # fmt: skip


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=32,
    )  # fmt: skip


def _bert(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = TINY["bert-mlm"].config(**_LABELS)
    return getattr(transformers, f"BertFor{kind}")(config).eval()


def _speech(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**_SPEECH, **_LABELS)
    return getattr(transformers, f"Wav2Vec2For{kind}")(config).eval()


def _sounds() -> Any:
    return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)


def _heard() -> nn.Module:
    torch.manual_seed(0)
    few = {"layers": 2, "attention_heads": 2, "ffn_dim": 16}
    sizes = {f"{p}_{name}": size for p in ("encoder", "decoder") for name, size in few.items()}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    config = transformers.Speech2TextConfig(
        vocab_size=len(WORDS),
        d_model=16,
        conv_channels=16,
        input_feat_per_channel=8,
        **ids,
        **sizes,
    )
    return transformers.Speech2TextForConditionalGeneration(config).eval()


IDS = {"input_ids": torch.randint(6, 90, (2, 8))}
WAVES = {"input_values": torch.randn(2, 2000)}
CASES: dict[str, Any] = {
    "fill-mask": lambda: (_bert("MaskedLM"), IDS, ["w1 [MASK] w2", "[MASK] w3"], {}),
    "text-classification": lambda: (
        _bert("SequenceClassification"), IDS, TEXTS, {"batch_size": 2}),
    "token-classification": lambda: (_bert("TokenClassification"), IDS, TEXTS, {}),
    "zero-shot-classification": lambda: (
        _bert("SequenceClassification"), IDS, TEXTS[0], {"candidate_labels": ["w1", "w2 w3"]}),
    "feature-extraction": lambda: (_bert("MaskedLM").bert, IDS, TEXTS, {}),
    "text-generation": lambda: (
        TINY["gpt2-lm"].build()[0].eval(), IDS, TEXTS, {"max_new_tokens": 4, "do_sample": False}),
    "image-classification": lambda: (
        TINY["vit"].build()[0].eval(), {"pixel_values": TINY["vit"].build()[1]["pixel_values"]},
        __import__("PIL.Image").Image.fromarray(IMAGE), {"image_processor": _images()}),
    "audio-classification": lambda: (
        _speech("SequenceClassification"), WAVES, SOUND, {"feature_extractor": _sounds()}),
    "automatic-speech-recognition": lambda: (
        _speech("CTC"), WAVES, SOUND, {"feature_extractor": _sounds()}),
    "automatic-speech-recognition of a seq2seq model": lambda: (
        _heard(), {"input_features": torch.randn(2, 9, 8), "decoder_input_ids": IDS["input_ids"]},
        SOUND, {"generate_kwargs": {"max_new_tokens": 4}, "feature_extractor":
                transformers.Speech2TextFeatureExtractor(feature_size=8, num_mel_bins=8)}),
}  # fmt: skip


def _images() -> Any:
    size = TINY["vit"].build()[1]["pixel_values"].shape[-1]
    return transformers.ViTImageProcessor(size={"height": size, "width": size})


def served(case: str, **more: Any) -> list[Any]:
    """Return what the pipelines of a case give: ours, and that of the model alone."""
    model, example, inputs, options = CASES[case]()
    task = case.partition(" ")[0]
    plan = ipp.plan(model, example, num_stages=2, microbatches=2)
    given = {"tokenizer": _tokenizer(), **options}
    names = ("candidate_labels", "max_new_tokens", "do_sample", "generate_kwargs")
    calls = {k: given.pop(k) for k in names if k in given}
    alone = transformers.pipeline(task, model=model, **given)
    expected = alone(inputs, **calls)
    ours = ipp.pipeline(task, model, plan, **more, **given)
    assert type(ours) is type(alone)
    return [ours(inputs, **calls), expected]


@pytest.mark.parametrize("case", CASES)
def test_it_gives_what_the_model_gives(case: str) -> None:
    assert_same(*served(case))


def test_an_executable_serves_while_it_trains() -> None:
    model, batch = TINY["gpt2-lm"].build(batch_size=4)
    plan = ipp.plan(model, TINY["gpt2-lm"].build()[1], num_stages=2, microbatches=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with ipp.compile(model, plan, optimizer=optimizer, loss_weights="samples") as made:
        ours = ipp.pipeline("text-generation", made, tokenizer=_tokenizer(), do_sample=False)
        made.train_step(batch)
        found = ours("w1 w2", max_new_tokens=5)
        model.eval()
        alone = transformers.pipeline(
            "text-generation", model=model, tokenizer=_tokenizer(), do_sample=False
        )
        assert_same(found, alone("w1 w2", max_new_tokens=5))


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float | np.ndarray | np.floating | torch.Tensor):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert found == expected


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_its_model_is_set_and_saved_as_a_model_is(tmp_path: Path) -> None:
    model = _bert("MaskedLM")
    model.hf_device_map = {"": "cpu"}  # as accelerate notes it
    plan = ipp.plan(model, IDS, num_stages=2, microbatches=1)
    ours = ipp.pipeline("fill-mask", model, plan, tokenizer=_tokenizer())
    ours.model.marked = 3
    assert model.marked == 3
    ours.save_pretrained(tmp_path)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_what_it_cannot_do_is_refused() -> None:
    model = _bert("MaskedLM")
    plan = ipp.plan(model, IDS, num_stages=2, microbatches=1)
    with pytest.raises(LoweringError, match="the pipeline of task 'mask-generation' calls the"):
        ipp.pipeline("mask-generation", model, plan)
    with pytest.raises(ValueError, match="takes a model and its plan, or an executable alone"):
        ipp.pipeline("fill-mask", model)
    with (
        ipp.compile(model, plan, training=False) as made,
        pytest.raises(ValueError, match="target and compile_options say how a model is compiled"),
    ):
        ipp.pipeline("fill-mask", made, target="distributed")
    ours = ipp.pipeline("fill-mask", model, plan, tokenizer=_tokenizer())
    with pytest.raises(LoweringError, match="the pipeline's device is cuda and the executable's"):
        ours.model.to("cuda")
