"""Questions become tensors of one length; regions that do not fit the model are refused."""

from dataclasses import replace

import pytest
import torch

from ipu_pipeline.errors import DatasetError
from tasks.visual_question_answering import (
    AnswerSet,
    Questions,
    RegionTable,
    build_dataset,
    read_label,
)

ANSWERS = AnswerSet(("red", "yes", "no"))


@pytest.fixture
def split():
    table = RegionTable(torch.arange(20.0).reshape(2, 2, 5), torch.rand(2, 4), [1, 0, 1])
    texts = ["what colour is it", "is there a box", "is it"]
    labels = [read_label(text, "r") for text in ("red", "yes", "no")]
    return Questions("mine", texts, labels, table, ["a", "b", "c"])


def build(split, tokenizer, **changes):
    options = {"max_seq_length": 6, "region_features": 5} | changes
    return build_dataset(split, tokenizer, ANSWERS, **options)


def test_an_item_has_what_the_model_reads(split, tokenizer):
    dataset = build(split, tokenizer)
    assert len(dataset) == 3
    item = dataset[1]
    assert item["input_ids"].tolist() == [4, 6, 7, 8, 0, 0]
    assert item["attention_mask"].tolist() == [1, 1, 1, 1, 0, 0]
    assert torch.equal(item["visual_feats"], torch.arange(10.0).reshape(2, 5))
    assert item["visual_pos"].shape == (2, 4)
    assert item["labels"].item() == 1
    assert torch.equal(dataset[0]["visual_feats"], dataset[2]["visual_feats"])
    assert dataset.ids == ["a", "b", "c"]


def test_the_first_questions_as_a_batch(split, tokenizer):
    batch = build(split, tokenizer).head(2)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (2, 6),
        "token_type_ids": (2, 6),
        "attention_mask": (2, 6),
        "visual_feats": (2, 2, 5),
        "visual_pos": (2, 2, 4),
        "labels": (2,),
    }
    assert len(build(split, tokenizer).head(9)["labels"]) == 3


def test_long_questions_are_cut(split, tokenizer):
    assert build(split, tokenizer, max_seq_length=2)[0]["input_ids"].tolist() == [2, 3]


def test_refuses_another_feature_width(split, tokenizer):
    message = r"mine has 5 features per region, the model reads 2048 \(visual_feat_dim"
    with pytest.raises(DatasetError, match=message):
        build(split, tokenizer, region_features=2048)


def test_refuses_shapes_that_are_no_regions(split, tokenizer):
    flat = replace(split, regions=replace(split.regions, features_IRF=torch.rand(2, 5)))
    with pytest.raises(DatasetError, match=r"mine has region features of shape \(5,\) and boxes"):
        build(flat, tokenizer)
    wide = replace(split, regions=replace(split.regions, boxes_R4=torch.rand(2, 6)))
    with pytest.raises(DatasetError, match=r"boxes of shape \(2, 6\); each image needs \(regions"):
        build(wide, tokenizer)


def test_refuses_an_image_with_other_regions(split, tokenizer):
    uneven = [(torch.rand(2, 5), torch.rand(2, 4)), (torch.rand(3, 5), torch.rand(3, 4))]
    dataset = build(replace(split, regions=uneven), tokenizer)
    with pytest.raises(DatasetError, match=r"mine row 1 has regions and boxes of shapes \[\(3, 5"):
        dataset[1]


def test_refuses_too_long_questions(split, tokenizer):
    with pytest.raises(ValueError, match="max_seq_length 13 exceeds the 12 tokens that the model"):
        build(split, tokenizer, max_seq_length=13)


def test_refuses_no_question(split, tokenizer):
    with pytest.raises(DatasetError, match="mine holds no question; give at least one"):
        build(replace(split, questions=[]), tokenizer)
