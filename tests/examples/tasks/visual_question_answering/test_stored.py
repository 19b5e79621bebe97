"""Tables with region features: saved folders, Parquet, JSON; published names of columns."""

import json

import datasets
import numpy as np
import pytest
import torch

from ipu_pipeline.errors import DatasetError
from tasks.visual_question_answering import load_file, load_splits, read_rows


def test_reads_the_columns(table, rows):
    split = read_rows(table(question_id=[7, 8, 9]), "mine")
    assert list(split.questions) == rows()["question"]
    assert list(split.ids) == [7, 8, 9]
    assert [dict(label.weights) for label in split.labels] == [{0: 1.0}, {2: 1.0}, {1: 1.0}]
    features, boxes = split.regions[1]
    assert torch.equal(features, torch.arange(10.0, 20.0).reshape(2, 5))
    assert boxes.dtype == torch.float32
    assert split.region_shapes == ((2, 5), (2, 4))
    assert split.answers is None


def test_reads_published_names_of_columns(table, rows):
    given = rows()
    published = table(
        visual_feats=None,
        visual_pos=None,
        features=given["visual_feats"],
        normalized_boxes=given["visual_pos"],
        label=[{"ids": [1, 3], "weights": [1.0, 0.3]}] * 3,
    )
    split = read_rows(published, "mine", limit=2)
    assert len(split) == 2
    assert split.labels[1].weights == pytest.approx({1: 1.0, 3: 0.3})
    assert split.labels[1].soft
    assert list(split.ids) == [0, 1]


def test_array_columns_are_read_as_well(table, rows):
    arrays = datasets.Features(
        question=datasets.Value("string"),
        visual_feats=datasets.Array2D((2, 5), "float32"),
        visual_pos=datasets.Array2D((2, 4), "float32"),
        label=datasets.ClassLabel(names=["red", "yes", "no"]),
    )
    split = read_rows(datasets.Dataset.from_dict(rows(), features=arrays), "mine")
    assert split.region_shapes == ((2, 5), (2, 4))
    assert split.answers.names == ("red", "yes", "no")


def test_answers_are_named_by_soft_class_labels(rows):
    label = {
        "ids": datasets.List(datasets.ClassLabel(names=["a", "b"])),
        "weights": datasets.List(datasets.Value("float32")),
    }
    plain = datasets.Dataset.from_dict(rows(label=[{"ids": [1], "weights": [1.0]}] * 3))
    split = read_rows(plain.cast_column("label", label), "mine")
    assert split.answers.names == ("a", "b")


def test_a_saved_folder_is_read_offline(table, tmp_path):
    parts = datasets.DatasetDict(train=table(), validation=table(label=[1, 1, 1]))
    parts.save_to_disk(tmp_path / "both")
    found = load_splits(str(tmp_path / "both"))
    assert set(found) == {"train", "validation"}
    assert found["validation"]["label"][:] == [1, 1, 1]
    table().save_to_disk(tmp_path / "one")
    assert set(load_splits(str(tmp_path / "one"))) == {"train"}


def test_an_unknown_data_set_is_refused(monkeypatch):
    def offline(*_):
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = r"data set 'Graphcore/vqa-lxmert' cannot be loaded \(no route\); without a network"
    with pytest.raises(DatasetError, match=message):
        load_splits("Graphcore/vqa-lxmert")


def records(given):
    return [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]


def test_files_of_every_kind_give_the_same_rows(table, rows, tmp_path):
    listed = records(rows())
    (tmp_path / "a.json").write_text(json.dumps(listed))
    (tmp_path / "b.json").write_text(json.dumps({"data": listed}))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(row) for row in listed) + "\n")
    table().to_parquet(tmp_path / "d.parquet")
    for name in ("a.json", "b.json", "c.jsonl", "d.parquet"):
        split = read_rows(load_file(tmp_path / name), name)
        assert list(split.questions) == rows()["question"]
        np.testing.assert_array_equal(split.regions[2][0], rows()["visual_feats"][2])


def test_weights_by_text_are_read_from_json(rows, tmp_path):
    label = [{"net": 1}, {"net": 0.3, "dog": 0.9}, {}]
    (tmp_path / "a.json").write_text(json.dumps(records(rows(label=label))))
    split = read_rows(load_file(tmp_path / "a.json"), "a.json")
    assert [dict(given.weights) for given in split.labels] == [
        {"net": 1.0},
        {"net": 0.3, "dog": 0.9},
        {},
    ]


UNREADABLE = [
    ("none.json", None, r"cannot read the samples .*none\.json: No such file"),
    ("a.csv", "x", r"a\.csv is no \.parquet, \.json or \.jsonl file"),
    ("a.json", "[{", r"a\.json is no JSON that can be read: .*line 1"),
    ("a.json", "[]", r"a\.json holds no sample; pass a file with at least one"),
    ("a.json", "[1]", r"a\.json is not a list of JSON objects; write"),
    ("a.jsonl", "", r"a\.jsonl holds no sample"),
    ("a.parquet", "PAR", r"a\.parquet as Parquet cannot be loaded \("),
]


@pytest.mark.parametrize(("name", "content", "message"), UNREADABLE)
def test_refuses_files_that_hold_no_rows(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=message):
        load_file(tmp_path / name)


def test_refuses_a_missing_column(table):
    message = (
        r"mine has no column 'visual_feats' or 'features', only \['question', 'visual_pos', "
        r"'label'\]; rename or add it"
    )
    with pytest.raises(DatasetError, match=message):
        read_rows(table(visual_feats=None), "mine")


def test_refuses_no_rows(table):
    with pytest.raises(DatasetError, match="mine holds no question; give at least one"):
        read_rows(table(), "mine", limit=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, r"a\.json row 0 has the question None; give each one"),
        ({"question_id": None}, r"a\.json row 0 has the question_id None; give each one"),
        ({"visual_feats": [["x"]]}, r"a\.json cannot be loaded .*; give the rows columns of one"),
        ({"label": {"a": [[1]]}}, r"a\.json"),
    ],
)
def test_rows_of_other_kinds_are_refused(rows, tmp_path, change, message):
    listed = [row | {"question_id": i} for i, row in enumerate(records(rows()))]
    listed[0] |= change
    (tmp_path / "a.json").write_text(json.dumps(listed))
    with pytest.raises(DatasetError, match=message):
        read_rows(load_file(tmp_path / "a.json"), str(tmp_path / "a.json"))


def test_regions_are_finite_numbers(rows, tmp_path):
    listed = records(rows())
    listed[0]["visual_feats"][0][0] = 1e300
    (tmp_path / "a.json").write_text(json.dumps(listed))
    split = read_rows(load_file(tmp_path / "a.json"), "a.json")
    with pytest.raises(
        DatasetError, match=r"a\.json row 0 cannot be loaded .*not finite.*give reg"
    ):
        split.regions[0]
