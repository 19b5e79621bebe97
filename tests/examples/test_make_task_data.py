"""The demo data of the tasks: the same bytes, and what makes memory useless."""

import csv
import hashlib
import io
import json
import re

import pytest
from typer.testing import CliRunner

TASKS = ("classification", "ner", "swag", "mlm", "pretraining", "sst2")
OWN_TOKENIZER = ("clm", "xnli", "summarization", "translation")


@pytest.fixture
def module(example):
    return example("make_task_data")


def rows_of(module, task, split, size=200):
    text = module.make_split(task, split, size, 42)
    if task == "ner":
        return [json.loads(line) for line in text.splitlines()]
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("task", TASKS + OWN_TOKENIZER)
def test_the_same_seed_writes_the_same_bytes(module, task, tmp_path):
    def digest(seed):
        module.main(task, tmp_path, seed, 20, 10)
        files = sorted(tmp_path.iterdir())
        if task in OWN_TOKENIZER:
            files = [path for path in files if not path.name.startswith("tokenizer_config")]
        stems = ["tokenizer"] * (task in OWN_TOKENIZER) + ["train", "validation"]
        assert [path.stem for path in files] == stems
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    first = digest(1)
    assert digest(1) == first
    assert set(digest(2)).isdisjoint(first)


def test_validation_asks_about_names_that_training_does_not_have(module):
    names = {}
    for split in ("train", "validation"):
        rows = rows_of(module, "ner", split, 1000)
        names[split] = {
            word for row in rows
            for word, tag in zip(row["tokens"], row["ner_tags"], strict=True) if tag != "O"
        }  # fmt: skip
    assert len(names["train"]) > 500
    assert len(names["validation"]) > 300
    assert not names["train"] & names["validation"]


def test_tags_follow_the_words(module):
    for row in rows_of(module, "ner", "train"):
        assert len(row["tokens"]) == len(row["ner_tags"])
        before = "O"
        for tag in row["ner_tags"]:
            assert tag in {"O", *(f"{p}-{k}" for p in "BI" for k in ("PER", "LOC", "ORG"))}
            assert not tag.startswith("I-") or before[2:] == tag[2:]
            before = tag


def test_endings_differ_in_their_subject_only(module):
    training = rows_of(module, "swag", "train")
    validation = rows_of(module, "swag", "validation")
    assert {row["label"] for row in validation} == {"0", "1", "2", "3"}
    for row in (*training, *validation):
        endings = {row[f"ending{i}"] for i in range(4)}
        assert len(endings) == 4
        assert row["sent2"] == ""
    unseen = "\n".join(module.make_split("swag", "train", 800, 42).splitlines())
    for theme in module.TEXT["held_out_themes"]:
        fixed = [s for s in module.THEMES[theme] if "{" not in s]
        assert fixed
        assert not any(sentence in unseen for sentence in fixed)


def test_a_review_says_what_its_label_says(module):
    words = module.TEXT["reviews"]
    liked = {*words["positive"], *words["held_out_positive"]}
    for split in ("train", "validation"):
        rows = rows_of(module, "classification", split, 400)
        counts = {}
        for row in rows:
            aspect = row["sentence2"].removeprefix("The ")
            counts[row["label"]] = counts.get(row["label"], 0) + 1
            clauses = [c for c in module_clauses(row["sentence1"]) if f"the {aspect} " in c]
            if row["label"] == "unmentioned":
                assert not clauses
                continue
            (clause,) = clauses
            negated = " not " in clause or "nobody" in clause
            positive = clause.rsplit(" ", 1)[1] in liked
            assert row["label"] == ("positive" if positive != negated else "negative")
        assert max(counts.values()) < 0.5 * len(rows)
    assert "terrace" not in module.make_split("classification", "train", 400, 42)


def module_clauses(text):
    text = text.rstrip(".").lower()
    for link in (", but ", ", while ", "; "):
        text = text.replace(link, " and ")
    return [clause + "" for clause in text.split(" and ")]


def test_stories_keep_their_names_and_training_lacks_part_of_the_sentences(module):
    rest = {s for theme in module.THEMES.values() for s in theme[-2:] if "{" not in s}
    assert rest
    text = {split: module.make_split("mlm", split, 1500, 42) for split in ("train", "validation")}
    assert not any(sentence in text["train"] for sentence in rest)
    assert all(sentence in text["validation"] for sentence in rest)
    stories = module.make_split("pretraining", "train", 20, 42).strip().split("\n\n")
    assert len(stories) == 20
    assert all(4 <= len(story.splitlines()) <= 6 for story in stories)


def test_refuses_unknown_tasks_and_sizes(module, tmp_path):
    with pytest.raises(ValueError, match="there is no demo data for 'qa', only for classif"):
        module.make_split("qa", "train", 1, 0)
    with pytest.raises(ValueError, match="the train file needs at least 1 sample, got 0"):
        module.make_split("ner", "train", 0, 0)


def test_as_a_command(module, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(module.main)
    given = ["ner", "--output_dir", str(tmp_path / "d"), "--num_validation", "3"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert f"{module.DEMOS['ner'].num_train} samples" in done.output
    assert len((tmp_path / "d" / "validation.jsonl").read_text().splitlines()) == 3
    assert "no demo data for 'qa'" in str(CliRunner().invoke(app, ["qa", *given[1:]]).exception)


def test_claims_follow_from_their_reviews_or_not(module):
    rows = rows_of(module, "xnli", "train", 600)
    labels = [row["label"] for row in rows]
    assert min(map(labels.count, ("entailment", "neutral", "contradiction"))) > 60
    assert 200 < sum(row["language"] == "de" for row in rows) < 400
    for row in rows:
        about = row["hypothesis"].split()[1]
        assert (about in re.findall(r"\w+", row["premise"])) == (row["label"] != "neutral")
        assert (" war gut." in row["hypothesis"]) == (row["language"] == "de")


def test_summaries_name_what_was_liked_and_what_was_not(module):
    for row in map(
        json.loads, module.make_split("summarization", "validation", 50, 1).splitlines()
    ):
        named = re.findall(r"\w+(?=[,.])", row["summary"])
        assert named
        assert all(f"the {aspect} " in row["text"].lower() for aspect in named)


def test_translations_agree_in_gender_case_and_order(module):
    rows = [
        json.loads(line)["translation"]
        for split in ("train", "validation")
        for line in module.make_split("translation", split, 400, 1).splitlines()
    ]
    german = " ".join(row["de"] for row in rows)
    assert re.search(r"den \w+en (Hund|Mann|Baum)\b", german)
    assert not re.search(r"(der|die|den) (\w+ )?(Kind|Haus|Buch)\b", german)
    assert re.search(r"Heute \w+ (der|die|das) ", german)
    nouns = [re.findall(r"[A-ZÖÄÜ]\w+", row["de"][1:]) for row in rows]
    pairs = [tuple(found) for found in nouns]
    assert not set(pairs[:400]) & set(pairs[400:])


def test_a_tokenizer_reads_its_texts_back(module):
    texts = [row["summary"] for row in module.make_rows("summarization", "train", 60, 1)]
    tokenizer = module.make_tokenizer(texts, 200)
    ids = tokenizer(texts[0])["input_ids"]
    assert len(tokenizer) <= 200
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == texts[0]
