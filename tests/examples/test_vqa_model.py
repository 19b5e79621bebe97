"""Which model, tokenizer and answers run_vqa.py takes, from weights or from a config.json."""

import pytest
import torch
from transformers import BertConfig, LxmertForQuestionAnswering

from ipu_pipeline.errors import PipelineError
from tasks.visual_question_answering import SoftAnswerLoss
from tests.examples.vqa_tables import WIDTH, write_config, write_json


@pytest.fixture
def load(example, tmp_path):
    """Return a function that loads a model for tiny data."""
    example("run_vqa")

    def call(form="text", **changes):
        train, validation = write_json(tmp_path, form)
        given = {
            "model_name_or_path": "small",
            "output_dir": tmp_path / "out",
            "train_file": train,
            "validation_file": validation,
            "do_train": True,
            "do_eval": True,
        } | changes
        options = example("vqa_options").Options(**given)
        torch.manual_seed(0)
        splits = example("vqa_data").read_splits(options)
        return example("vqa_model").load_lxmert(options, splits)

    return call


@pytest.fixture
def trained(load, tmp_path):
    """Write a model with weights that chooses from two answers; return its folder."""
    loaded = load(model_name_or_path=str(write_config(tmp_path / "config")))
    loaded.model.resize_num_qa_labels(2)
    loaded.model.config.id2label = {0: "no", 1: "yes"}
    loaded.model.save_pretrained(tmp_path / "trained")
    loaded.tokenizer.save_pretrained(tmp_path / "trained")
    return str(tmp_path / "trained")


def test_new_weights_are_as_wide_as_the_data(load, capsys):
    loaded = load()
    config = loaded.model.config
    assert (config.hidden_size, config.l_layers, config.r_layers, config.x_layers) == (64, 1, 1, 2)
    assert config.visual_feat_dim == WIDTH
    assert config.vocab_size == len(loaded.tokenizer) == 4 + 9
    assert config.num_qa_labels == loaded.model.num_qa_labels == 3
    assert loaded.answers.names == ("blue", "green", "red")
    assert config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert loaded.model.training
    assert "13 words, 3 answers" in capsys.readouterr().out


def test_questions_become_words(load):
    encoded = load().tokenizer("What colour has the dog?")
    words = load().tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert words == ["[CLS]", "what", "colour", "has", "the", "[UNK]", "?", "[SEP]"]


def test_a_folder_without_weights_may_have_a_tokenizer(load, trained, tmp_path):
    folder = write_config(tmp_path / "only_tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "trained" / name).read_bytes())
    loaded = load(model_name_or_path=str(folder))
    assert loaded.model.config.hidden_size == 16
    assert loaded.model.config.vocab_size == 13


def test_weights_keep_their_answers(load, trained):
    loaded = load("hard", model_name_or_path=trained)
    assert loaded.answers.names == ("no", "yes")


def test_answers_without_names_are_numbered(load, trained):
    model = LxmertForQuestionAnswering.from_pretrained(trained)
    model.resize_num_qa_labels(4)
    model.save_pretrained(trained)
    assert load("hard", model_name_or_path=trained).answers.names == ("0", "1", "2", "3")


@pytest.mark.parametrize("size", [2, 3])
def test_a_replaced_head_is_new(load, trained, size, capsys):
    model = LxmertForQuestionAnswering.from_pretrained(trained)
    model.resize_num_qa_labels(size)
    model.save_pretrained(trained)
    loaded = load(model_name_or_path=trained, replace_qa_head=True)
    assert loaded.answers.names == ("blue", "green", "red")
    old, new = model.get_qa_logit_layer(), loaded.model.get_qa_logit_layer()
    assert new.weight.shape == (3, 32)
    assert not torch.equal(new.weight[:2], old.weight[:2])
    assert 0 < new.weight.std() < 0.2
    assert not new.bias.any()
    kept = loaded.model.lxmert.embeddings.word_embeddings.weight
    assert torch.equal(kept, model.lxmert.embeddings.word_embeddings.weight)
    assert loaded.model.config.id2label[2] == "red"
    assert "new question answering head for 3 answers" in capsys.readouterr().out


def test_soft_labels_get_their_loss(load):
    assert isinstance(load("soft").model.loss, SoftAnswerLoss)
    assert isinstance(load("hard").model.loss, torch.nn.CrossEntropyLoss)


def test_another_kind_of_model_is_refused(load, tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(PipelineError, match=r"is a bert, run_vqa\.py trains lxmert; pass su"):
        load(model_name_or_path=str(tmp_path / "bert"))


def test_new_weights_cannot_be_evaluated(load):
    with pytest.raises(PipelineError, match="model 'small' has no weights; add --do_train, or pa"):
        load(do_train=False, train_file=None)


def test_a_model_that_is_not_here_is_refused(load, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = r"model '/no/such' cannot be loaded \(.*\); without a network pass a local folder"
    with pytest.raises(PipelineError, match=message):
        load(model_name_or_path="/no/such")
