"""Rows from files and from data sets; every mistake is named with its place."""

import json

import pytest

from ipu_pipeline.errors import DatasetError
from tasks.samples import in_data, load_hub_rows, read_rows, require

ROWS = [{"text": "a, b", "label": 1}, {"text": "c", "label": 0}]
FILES = {
    "list.json": json.dumps(ROWS),
    "data.json": json.dumps({"data": ROWS}),
    "lines.json": "\n".join(json.dumps(row) for row in ROWS),
    "lines.jsonl": "\n\n".join(json.dumps(row) for row in ROWS) + "\n",
}


@pytest.mark.parametrize("name", FILES)
def test_reads_every_kind_of_json(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    assert read_rows(tmp_path / name) == ROWS


def test_one_object_is_one_sample(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0]))
    assert read_rows(tmp_path / "one.json") == ROWS[:1]


def test_a_table_has_text_in_every_column(tmp_path):
    (tmp_path / "t.csv").write_text('text,label\n"a, ""b""\nc",1\n')
    assert read_rows(tmp_path / "t.csv") == [{"text": 'a, "b"\nc', "label": "1"}]


def test_lines_of_text_keep_the_empty_ones(tmp_path):
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    assert read_rows(str(tmp_path / "t.txt")) == [{"text": "one"}, {"text": ""}, {"text": "two"}]


def test_only_a_line_feed_ends_a_line(tmp_path):
    odd = "a\u2028b\x85c\x0cd\u2029e"
    (tmp_path / "t.txt").write_text(f"{odd}\n\n{odd}\n", encoding="utf-8")
    assert read_rows(tmp_path / "t.txt") == [{"text": odd}, {"text": ""}, {"text": odd}]
    lines = "".join(json.dumps({"text": odd}, ensure_ascii=False) + "\n" for _ in range(2))
    (tmp_path / "t.jsonl").write_text(lines, encoding="utf-8")
    assert read_rows(tmp_path / "t.jsonl") == [{"text": odd}] * 2
    (tmp_path / "t.csv").write_text(f"text,n\n{odd},1\r\n{odd},2\n", encoding="utf-8")
    assert read_rows(tmp_path / "t.csv") == [{"text": odd, "n": "1"}, {"text": odd, "n": "2"}]
    (tmp_path / "e.txt").write_text("")
    with pytest.raises(DatasetError, match=r"e\.txt holds no sample"):
        read_rows(tmp_path / "e.txt")


MISTAKES = [
    ("x.parquet", "", r"parquet is of no known kind; pass a file that ends in \.json, \.jsonl"),
    ("none.csv", None, r"cannot read the samples .*none\.csv: No such file"),
    (
        "bytes.txt",
        b"\xff\xfe\x00",
        r"bytes\.txt as UTF-8 text: invalid start byte at byte 0; save it",
    ),
    ("empty.jsonl", "\n", r"empty\.jsonl holds no sample; pass a file with at least one"),
    ("n.json", "[1, 2]", r"n\.json is not a list of JSON objects; write \["),
    (
        "bad.json",
        '{"a": 1}\n{"a"',
        r"bad\.json, line 2 cannot be read: it is no JSON: .*; write one",
    ),
    ("n.jsonl", "3", r"n\.jsonl, line 1 holds a int; write one object per line"),
    ("t.csv", "a,b\n1,2,3\n", r"t\.csv, line 2 has 3 columns, not the 2 of the first line; quote"),
    ("u.csv", "a,b\n1\n", r"u\.csv, line 2 has 1 columns, not the 2"),
]


@pytest.mark.parametrize(("name", "content", "message"), MISTAKES)
def test_says_what_is_wrong_where(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError, match=message):
        read_rows(tmp_path / name)


def test_a_data_set_gives_names_in_place_of_numbers(monkeypatch):
    import datasets
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

    tags = ClassLabel(names=["O", "B-PER"])
    features = Features(
        {"tokens": Sequence(Value("string")), "ner_tags": Sequence(tags), "label": tags}
    )
    rows = [{"tokens": ["a", "b"], "ner_tags": [0, 1], "label": 1}]
    made = DatasetDict(train=Dataset.from_list(rows, features=features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: made)
    assert load_hub_rows("mine") == {
        "train": [{"tokens": ["a", "b"], "ner_tags": ["O", "B-PER"], "label": "B-PER"}]
    }


def test_a_data_set_that_is_not_there(monkeypatch):
    import datasets

    def offline(*_):
        raise ConnectionError("no route.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DatasetError) as caught:
        load_hub_rows("glue", "mrpc")
    assert str(caught.value) == (
        "data set 'glue' cannot be loaded (no route); without a network pass --train_file and "
        "--validation_file with files of samples instead of --dataset_name"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"b": 1}, r"row 3 has no column 'a' \(it has \['b'\]\); rename it, or say which columns"),
        ({}, r"row 3 has no column 'a' \(it has \[\]\)"),
        ({"a": 1}, "row 3: 'a' is a int, it has to be str or list"),
        ({"a": True}, "row 3: 'a' is a bool, it has to be str or list"),
    ],
)
def test_a_column_has_to_be_there_and_of_its_kind(row, message):
    with pytest.raises(DatasetError, match=message):
        require(row, "a", (str, list), "row 3")


def test_one_column_and_long_fields(tmp_path):
    long = "y" * 200_000
    (tmp_path / "t.csv").write_bytes(f"text\r\na\u2028b\x85c\r\n{long}\r\n".encode())
    assert read_rows(tmp_path / "t.csv") == [{"text": "a\u2028b\x85c"}, {"text": long}]
    (tmp_path / "t.txt").write_bytes(b"a\x0cb\r\nc\r\n")
    assert read_rows(tmp_path / "t.txt") == [{"text": "a\x0cb"}, {"text": "c"}]


def test_what_is_wrong_with_samples_names_their_file():
    with pytest.raises(DatasetError, match=r"t\.csv, row 0 has no column 'a'"), in_data("t.csv"):
        require({"b": 1}, "a", str, "row 0")
