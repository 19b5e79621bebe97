from __future__ import annotations

import json
import time

import pytest
import torch
import transformers

from ipu_pipeline.capture import capture
from ipu_pipeline.capture.example_batch import BatchSize, example_batch
from ipu_pipeline.capture.from_config import (
    TASKS,
    build_model,
    config_named,
    from_config,
    infer_task,
    load_config,
)
from ipu_pipeline.errors import CaptureError, PlanError
from tests.tiny_models import TINY

ENCODER = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize("name", TINY)
def test_model_computes_a_finite_loss_on_its_batch(name: str) -> None:
    model, batch = TINY[name].build()
    loss = model(**batch).loss
    assert model.training
    assert loss.shape == ()
    assert torch.isfinite(loss)
    loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_meta_and_cpu_agree_on_every_shape(name: str) -> None:
    model, batch = TINY[name].build()
    meta_model, meta_batch = TINY[name].build(device="meta")
    assert all(parameter.is_meta for parameter in meta_model.parameters())
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in meta_batch.items()
    }
    assert all(value.is_meta for value in meta_batch.values())
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in meta_model.state_dict().items()
    }


@pytest.mark.parametrize("name", TINY)
def test_same_seed_gives_the_same_weights_and_values(name: str) -> None:
    first, first_batch = TINY[name].build(seed=3)
    second, second_batch = TINY[name].build(seed=3)
    assert all(torch.equal(first_batch[key], second_batch[key]) for key in first_batch)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other_batch = TINY[name].build(seed=4)[1]
    assert any(not torch.equal(first_batch[key], other_batch[key]) for key in first_batch)


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    TINY["bert-qa"].build()
    assert torch.equal(torch.rand(3), expected)


def test_text_batch_has_padding_and_labels_inside_the_text() -> None:
    _, batch = TINY["bert-qa"].build(batch_size=4, seq_length=16)
    lengths = batch["attention_mask"].sum(dim=-1)
    assert lengths.tolist() == [16, 12, 16, 12]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert (batch["input_ids"][batch["attention_mask"] == 1] != 0).all()
    assert (batch["end_positions"] < lengths).all()
    assert batch["token_type_ids"].unique().tolist() == [0, 1]


def test_full_sequences_come_without_a_mask() -> None:
    config = transformers.LlamaConfig(**ENCODER, architectures=["LlamaForCausalLM"])
    assert set(from_config(config, seq_length=16, padded=False)[1]) == {"input_ids", "labels"}
    assert "attention_mask" in from_config(config, seq_length=16)[1]


def test_single_row_is_padded_too() -> None:
    _, batch = TINY["bert-qa"].build(batch_size=1, seq_length=16)
    assert batch["attention_mask"].sum().item() == 12


@pytest.mark.parametrize("name", ["bert-mlm", "gpt2-lm", "t5", "bart", "whisper", "llama"])
def test_token_labels_are_in_range_or_ignored(name: str) -> None:
    model, batch = TINY[name].build(batch_size=3)
    labels = batch["labels"]
    kept = labels[labels != -100]
    assert len(kept) > 0
    assert (labels == -100).any()
    assert kept.min() >= 0
    assert kept.max() < model.config.get_text_config().vocab_size


def test_decoder_inputs_are_the_labels_shifted_right() -> None:
    _, batch = TINY["t5"].build()
    assert (batch["decoder_input_ids"][:, 0] == 0).all()
    kept = batch["labels"][:, :-1] != -100
    assert torch.equal(batch["decoder_input_ids"][:, 1:][kept], batch["labels"][:, :-1][kept])


OTHERS = {
    "multiple-choice": transformers.BertConfig(**ENCODER),
    "token-classification": transformers.BertConfig(**ENCODER, num_labels=4),
    "sequence-classification": transformers.BartConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
        max_position_embeddings=32,
    ),
    "question-answering": transformers.LxmertConfig(
        vocab_size=60, hidden_size=16, num_attention_heads=2, intermediate_size=16, l_layers=1,
        x_layers=1, r_layers=1, num_qa_labels=3, visual_feat_dim=8,
    ),
    "visual-question-answering": transformers.ViltConfig(
        **{**ENCODER, "max_position_embeddings": 40}, image_size=16, patch_size=8, num_labels=3,
    ),
    "speech-seq2seq": transformers.Speech2TextConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
        input_feat_per_channel=8, input_channels=1, conv_channels=16, max_target_positions=32,
    ),
    "ctc": transformers.Wav2Vec2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, conv_dim=[8, 8], conv_stride=[2, 2], conv_kernel=[3, 2],
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, apply_spec_augment=False,
    ),
    "audio-classification": transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=[8, 8], conv_stride=[2, 2], conv_kernel=[3, 2], num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=3,
        apply_spec_augment=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", OTHERS)
def test_other_tasks_compute_a_loss(task: str) -> None:
    model, batch = from_config(OTHERS[task], task, batch_size=2, seq_length=16, device="cpu")
    assert torch.isfinite(model(**batch).loss)


PAIRED = {
    "next_sentence_label": transformers.BertConfig(**ENCODER),
    "sentence_order_label": transformers.AlbertConfig(**ENCODER, embedding_size=8),
}


@pytest.mark.parametrize("label", PAIRED)
def test_pretraining_has_hidden_tokens_and_pairs(label: str) -> None:
    model, batch = from_config(
        PAIRED[label], "pretraining", batch_size=8, device="cpu", seq_length=16
    )
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", label}
    assert set(batch[label].tolist()) == {0, 1}
    assert torch.isfinite(model(**batch).loss)


def test_pretraining_without_pairs_is_another_task() -> None:
    config = transformers.RobertaConfig(**ENCODER)
    with pytest.raises(CaptureError, match=r"RobertaForMaskedLM learns nothing about pairs of sen"):
        from_config(config, "pretraining", seq_length=16)
    assert (
        infer_task(transformers.RobertaConfig(architectures=["RobertaForMaskedLM"])) == "masked-lm"
    )
    assert (
        infer_task(transformers.BertConfig(architectures=["BertForPreTraining"])) == "pretraining"
    )


def test_single_output_gets_a_number_per_sample() -> None:
    config = transformers.BertConfig(**ENCODER, num_labels=1)
    _, batch = from_config(config, "sequence-classification", seq_length=8, device="cpu")
    assert batch["labels"].dtype == torch.float32


def test_every_task_has_an_auto_class_and_a_batch() -> None:
    from ipu_pipeline.capture.example_batch import _BUILDERS

    assert set(TASKS) == set(_BUILDERS)
    assert all(hasattr(transformers, name) for name in TASKS.values())


def test_70b_on_meta_is_fast() -> None:
    config = transformers.LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
    )
    begin = time.process_time()
    model, batch = from_config(config, "causal-lm", batch_size=1, seq_length=2048)
    assert time.process_time() - begin < 60  # to fill the weights takes minutes
    assert sum(parameter.numel() for parameter in model.parameters()) > 68e9
    assert batch["input_ids"].shape == (1, 2048)


# ---------------------------------------------------------------- configs by name


def test_config_from_file_and_folder(tmp_path) -> None:
    config = transformers.BertConfig(**ENCODER, architectures=["BertForQuestionAnswering"])
    config.save_pretrained(tmp_path)
    for where in (tmp_path, tmp_path / "config.json"):
        assert load_config(where).hidden_size == 16
        model, _ = from_config(where, infer_task(load_config(where)), seq_length=8)
        assert type(model).__name__ == "BertForQuestionAnswering"


def test_missing_config_says_what_to_pass() -> None:
    with pytest.raises(
        CaptureError, match=r"no transformers config at 'no/such-model'.*local folder"
    ):
        load_config("no/such-model")


def test_unknown_model_type(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nosuch"}))
    with pytest.raises(CaptureError, match=r"no transformers config at .*nosuch"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "architecture", "task"),
    [
        (transformers.BertConfig(), "BertForMaskedLM", "masked-lm"),
        (transformers.GPT2Config(), "GPT2LMHeadModel", "causal-lm"),
        (transformers.T5Config(), "T5ForConditionalGeneration", "seq2seq-lm"),
        (transformers.WhisperConfig(), "WhisperForConditionalGeneration", "speech-seq2seq"),
        (transformers.LxmertConfig(), "LxmertForQuestionAnswering", "visual-question-answering"),
        (transformers.ViTConfig(), "ViTForImageClassification", "image-classification"),
    ],
)
def test_task_is_read_from_the_architecture(config, architecture: str, task: str) -> None:
    config.architectures = [architecture]
    assert infer_task(config) == task


def test_task_of_a_bare_config_is_unknown() -> None:
    with pytest.raises(CaptureError, match=r"cannot tell the task of this vit config.*no archi"):
        infer_task(transformers.ViTConfig())


def test_unknown_task() -> None:
    with pytest.raises(CaptureError, match="unknown task 'qa'; choose one of pretraining"):
        build_model(transformers.BertConfig(), "qa")
    with pytest.raises(CaptureError, match="no example batch for task 'qa'"):
        example_batch(
            build_model(transformers.ViTConfig(), "image-classification"), "qa", BatchSize()
        )


def test_model_without_a_class_for_the_task() -> None:
    with pytest.raises(CaptureError, match="no vit model for causal-lm; it has image-class"):
        build_model(transformers.ViTConfig(), "causal-lm")


@pytest.mark.parametrize(("name", "limit"), [("bert-qa", 64), ("roberta", 62)])
def test_too_long_a_sequence_names_the_limit(name: str, limit: int) -> None:
    TINY[name].build(seq_length=limit)
    with pytest.raises(
        ValueError, match=f"seq_length {limit + 1} is longer .* use at most {limit}"
    ):
        TINY[name].build(seq_length=limit + 1)


def test_too_long_a_transcript_names_the_limit() -> None:
    with pytest.raises(ValueError, match="seq_length 41 is longer than the 40 positions"):
        TINY["whisper"].build(seq_length=41)


@pytest.mark.parametrize(("rows", "tokens"), [(0, 16), (1, 3)])
def test_sizes_that_make_no_batch(rows: int, tokens: int) -> None:
    with pytest.raises(ValueError, match=r"must be at least [14], got [03]"):
        BatchSize(rows, tokens)


def test_classifier_without_padding_token_is_refused() -> None:
    config = TINY["gpt2-lm"].config(pad_token_id=None)
    with pytest.raises(CaptureError, match="pad_token_id, and its config has none"):
        from_config(config, "sequence-classification", seq_length=8)


def test_audio_model_of_unknown_input_is_refused() -> None:
    model = build_model(TINY["whisper"].config(), "speech-seq2seq")
    model.config = transformers.T5Config()
    with pytest.raises(CaptureError, match="cannot tell the audio input of Whisper"):
        example_batch(model, "speech-seq2seq", BatchSize())


def test_visual_model_of_unknown_input_is_refused() -> None:
    model = build_model(TINY["gpt2-lm"].config(), "causal-lm")
    with pytest.raises(CaptureError, match="takes neither visual_feats nor pixel_values"):
        example_batch(model, "visual-question-answering", BatchSize(1, 8))


def test_a_composite_config_has_its_text_models_vocabulary():
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
            "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 32}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, image_token_index=30, architectures=["Gemma3ForConditionalGeneration"]
    )
    model, batch = from_config(config, infer_task(config), seq_length=8)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert batch["input_ids"].shape == (1, 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.SiglipConfig(), "siglip config .* say which: image-classification; or plan"),
        (transformers.LlavaConfig(), "llava config .* no task is known for it: plan it in Python"),
        (transformers.Qwen2_5_VLConfig(), "qwen2_5_vl config .* no task is known for it: plan it"),
    ],
)
def test_the_remedy_names_tasks_that_exist(config, message):
    with pytest.raises(CaptureError, match=message):
        infer_task(config)


def test_a_config_without_the_decoders_first_token_is_refused():
    config = transformers.T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2
    )
    with pytest.raises(CaptureError, match="this t5 model has no decoder_start_token_id, with wh"):
        from_config(config, "seq2seq-lm", seq_length=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**6}, "config.json: num_hidden_layers may be 10000 at most"),
        ({"part": {"num_labels": 10**9}}, "'part': num_labels may be 1000000 at most"),
        ({"architectures": [3]}, r"config.json: architectures is \[3\]; give names of classes"),
        ({"hidden_size": 7}, "transformers cannot build the model of .*config.json"),
        ({"hidden_size": "x"}, "(cannot build the model of|no transformers config at) .*config"),
        ({"max_position_embeddings": 1}, "config.json: seq_length 8 is longer than the 1 posit"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_name(tmp_path, change, message) -> None:
    config = transformers.BertConfig(**ENCODER, architectures=["BertForQuestionAnswering"])
    given = config.to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(given), encoding="utf-8")
    with pytest.raises((CaptureError, ValueError), match=message):
        from_config(tmp_path / "config.json", seq_length=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"chunk_size_feed_forward": 3},
            "ValueError: The dimension to be chunked 8 has to be a mu",
        ),
        ({"chunk_size_feed_forward": "x"}, "TypeError: '>' not supported between"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "ValueError: too many values to unpack"),
    ],
)
def test_a_config_whose_model_fails_is_refused_by_name(tmp_path, change, message) -> None:
    config = transformers.BertConfig(**ENCODER, architectures=["BertForQuestionAnswering"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict() | change), encoding="utf-8")
    built = from_config(path, seq_length=8)
    with (
        pytest.raises(
            CaptureError, match=rf"config.json fails in its forward \({message}.*\); correct the c"
        ),
        config_named(path),
    ):
        capture(*built)


def test_what_is_not_the_models_stays_as_it_is() -> None:
    for error, message in (
        (ValueError("num_stages is 9"), "^num_stages is 9$"),
        (PlanError("no plan"), "^no plan$"),
        (CaptureError("no loss"), "^a.json: no loss$"),
        (CaptureError("a.json has no loss"), "^a.json has no loss$"),
    ):
        with pytest.raises(type(error), match=message), config_named("a.json"):
            raise error


def test_a_config_is_an_object(tmp_path) -> None:
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CaptureError, match=r"config.json holds a list; a config.json is an object"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{" * 5000, encoding="utf-8")
    with pytest.raises(CaptureError, match=r"cannot read the config .*config.json"):
        load_config(tmp_path)
