"""SQuAD v1.1 files: what is read, and what a malformed file is told."""

import json

import datasets
import pytest

from ipu_pipeline.errors import DatasetError, PipelineError
from tasks.question_answering import load_hub_squad, read_squad

CONTEXT = "Zoë Müller was born in 1887 in Bern. Bern is old."


def question(identifier="q1", text="1887", start=23, **more):
    answers = [{"text": text, "answer_start": start}]
    return {"id": identifier, "question": "When?", "answers": answers, **more}


def squad(*qas, context=CONTEXT):
    paragraph = {"context": context, "qas": list(qas)}
    return {"version": "1.1", "data": [{"title": "Zoë", "paragraphs": [paragraph]}]}


@pytest.fixture
def write(tmp_path):
    def write_file(content):
        path = tmp_path / "squad.json"
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def test_reads_questions_in_file_order(write):
    second = question("q2", "Bern", 31)
    second["answers"].append({"text": "Bern", "answer_start": 37})
    first, other = read_squad(write(squad(question(), second)))
    assert (first.id, first.question, first.title, first.context) == ("q1", "When?", "Zoë", CONTEXT)
    assert [(a.text, a.start) for a in other.answers] == [("Bern", 31), ("Bern", 37)]


def test_an_article_needs_no_title(write):
    content = squad(question())
    del content["data"][0]["title"]
    assert read_squad(write(content))[0].title == ""


def test_dataset_error_is_a_pipeline_error():
    assert issubclass(DatasetError, PipelineError)


def without(holder, key):
    return {name: value for name, value in holder.items() if name != key}


MALFORMED = {
    "not JSON": (
        '{"data": [}',
        r"cannot read the SQuAD v1.1 file .*it is no JSON: .*line 1 column 11",
    ),
    "a list": ([1], "holds a list at its top, expected an object with 'data'"),
    "no data": ({"version": "1.1"}, r"has no 'data' \(it has \['version'\]\); SQuAD v1.1 needs it"),
    "data is a dict": ({"data": {}}, "'data' is a dict, SQuAD v1.1 wants list"),
    "article is a string": ({"data": ["x"]}, r"data\[0\] has no 'paragraphs' \(it has str\)"),
    "empty": (squad(), "holds no question; pass a SQuAD v1.1 file with at least one"),
    "no id": (squad(without(question(), "id")), r"paragraphs\[0\]\.qas\[0\] has no 'id'"),
    "start is text": (
        squad(question(), question("q2", start="23")),
        r"qas\[1\]\.answers\[0\]: 'answer_start' is a str, SQuAD v1.1 wants int",
    ),
    "start is a boolean": (squad(question(start=True)), "'answer_start' is a bool"),
    "counted in bytes": (
        squad(question(start=25)),
        r"answer '1887' is not at answer_start 25, where the context has '87 i'; "
        r"the text stands at 23: is answer_start counted in bytes\?",
    ),
    "negative start": (squad(question(start=-4)), "answer_start -4, where the context has ''"),
    "not in the context": (
        squad(question(text="1888")),
        "answer '1888' is not at answer_start 23, .* correct the text or remove the answer",
    ),
    "empty text": (squad(question(text="")), "answer '' is not at answer_start 23"),
    "version 2": (
        squad(question(is_impossible=True)),
        r"\(id 'q1'\) has no answer, as in SQuAD v2",
    ),
    "no answers": (squad({**question(), "answers": []}), "has no answer, as in SQuAD v2"),
    "same id twice": (squad(question(), question()), "id 'q1' occurs more than once"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_refuses_a_malformed_file(write, name):
    content, message = MALFORMED[name]
    path = write(content)
    with pytest.raises(DatasetError, match=message) as caught:
        read_squad(path)
    assert str(path) in str(caught.value)


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(
        DatasetError, match=r"cannot read the SQuAD v1\.1 file .*none\.json: No such file"
    ):
        read_squad(tmp_path / "none.json")


def test_refuses_what_is_not_text(tmp_path):
    path = tmp_path / "squad.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="as UTF-8 text: invalid start byte"):
        read_squad(path)


def rows(text="1887"):
    return {
        "id": ["a"],
        "title": ["Zoë"],
        "context": [CONTEXT],
        "question": ["When?"],
        "answers": [{"text": [text], "answer_start": [23]}],
    }


def test_reads_hub_columns_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows()).to_parquet(folder / f"{split}.parquet")
    splits = load_hub_squad(str(folder))
    assert set(splits) == {"train", "validation"}
    assert splits["train"][0].answers[0].text == "1887"
    assert splits["validation"][0].title == "Zoë"


def test_names_the_row_of_a_wrong_hub_answer(monkeypatch):
    wrong = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows("1999")))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: wrong)
    with pytest.raises(DatasetError, match=r"mine\[train\] row 0\.answers\[0\]: answer '1999'"):
        load_hub_squad("mine")


def test_refuses_hub_answers_without_starts(monkeypatch):
    columns = {**rows(), "answers": [{"text": ["1887"], "answer_start": []}]}
    wrong = datasets.DatasetDict(train=datasets.Dataset.from_dict(columns))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: wrong)
    with pytest.raises(DatasetError, match=r"row 0\.answers: 1 'text' but 0 'answer_start'"):
        load_hub_squad("mine")


@pytest.mark.parametrize(
    "error", [ConnectionError("no route.\nmore"), FileNotFoundError("no route")]
)
def test_offline_says_in_one_line_what_to_pass_instead(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DatasetError) as caught:
        load_hub_squad("squad")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data set 'squad' cannot be loaded (no route); without a network")
    assert "--train_file and --validation_file" in message
