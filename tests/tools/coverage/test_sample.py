"""Forty classes of all kinds of tasks and families go through the whole check."""

from __future__ import annotations

import pytest

from tools.coverage.check import check_class
from tools.coverage.classes import model_classes
from tools.coverage.record import Record

SAMPLE = (
    "AlbertForMultipleChoice", "BartForConditionalGeneration", "BertForQuestionAnswering",
    "BigBirdForMaskedLM", "BloomForSequenceClassification", "CLIPModel", "CTRLLMHeadModel",
    "CamembertForTokenClassification", "DebertaV2ForMaskedLM", "DeepseekV3ForCausalLM",
    "DeiTForImageClassification", "DistilBertForQuestionAnswering", "ElectraForPreTraining",
    "ErnieForNextSentencePrediction", "FNetForMaskedLM", "FalconForTokenClassification",
    "FunnelForMultipleChoice", "GPT2LMHeadModel", "GPTNeoXForQuestionAnswering",
    "GemmaForSequenceClassification", "HubertForCTC", "LayoutLMForTokenClassification",
    "LlamaForCausalLM", "LlavaForConditionalGeneration", "LongT5ForConditionalGeneration",
    "LxmertForQuestionAnswering", "MPNetForSequenceClassification", "MambaForCausalLM",
    "MixtralForCausalLM", "MobileBertForPreTraining", "OPTForCausalLM", "PegasusForCausalLM",
    "PvtForImageClassification", "Qwen2VLForConditionalGeneration",
    "SegformerForSemanticSegmentation",
    "T5ForConditionalGeneration", "ViTForImageClassification", "VideoMAEForVideoClassification",
    "Wav2Vec2ForAudioFrameClassification", "WhisperForConditionalGeneration",
)  # fmt: skip

# Keys shared in a dict, a cache in training, masks under vmap, statistics that no loss needs.
UNUSUAL = (
    "FlaubertForTokenClassification", "Gemma3ForSequenceClassification", "Gemma4ForCausalLM",
    "MobileNetV2ForSemanticSegmentation",
)  # fmt: skip


# Every sixteenth one of the usual classes; ``make test-acceptance`` tries the others.
QUICK = (*SAMPLE[1::16], *UNUSUAL)
LATER = [pytest.param(name, marks=pytest.mark.acceptance) for name in SAMPLE if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *LATER])
def test_class_trains_as_eager_does(name: str) -> None:
    (item,) = model_classes(name)
    record = check_class(item)
    assert (record.result, record.blocks > 0) == ("pass", True), record.reason
    assert record.stages == tuple(sorted({min(depth, record.blocks) for depth in (2, 4)}))
    assert record.difference <= 1e-6, record.reason


def test_the_sample_is_what_it_says() -> None:
    items = [item for item in model_classes() if item.name in SAMPLE]
    assert len(items) == len(SAMPLE) == 40
    assert len({item.task for item in items}) >= 15
    assert len({item.architecture for item in items}) >= 38
    assert Record.from_json(Record("A", "a", "t", "pass").to_json()).counted
