"""From rows to features: what each task's tokens and labels are, and what is refused."""

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, RobertaConfig, RobertaTokenizer

from ipu_pipeline.errors import DatasetError
from tasks.features import Setup
from tasks.table import TASKS
from tests.examples.tasks.tiny import make_rows, make_tokenizer

NO = -100


def setup_for(name, labels=(), pair_label="next_sentence_label", tokenizer=None, **options):
    given = TASKS[name].options(**{"max_seq_length": 16, **options})
    return Setup(tokenizer or make_tokenizer(), given, labels, pair_label)


def encode(name, rows, labels=(), **options):
    return TASKS[name].encode(rows, setup_for(name, labels, **options))


def texts(data, row, column="input_ids"):
    tokenizer = make_tokenizer()
    ids = data.columns[column][row]
    return tokenizer.decode(ids).replace("[PAD]", "").strip()


# ---------------------------------------------------------------- sequence classification


def test_pairs_of_texts_and_the_number_of_their_class():
    data = encode(
        "sequence-classification", make_rows("sequence-classification", 3), ("bad", "good")
    )
    assert set(data.columns) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert {len(ids) for ids in data.columns["input_ids"]} == {16}
    assert texts(data, 0).endswith("[SEP] w1 w2 [SEP]")
    assert set(data.columns["labels"]) <= {0, 1}
    assert data[1]["labels"] == data.columns["labels"][1]
    assert len(data) == 3


COLUMNS = [
    ({"label": "a", "x": "w1", "n": 3}, None, "[CLS] w1 [SEP]"),
    ({"x": "w1", "y": "w2", "z": "w3", "label": "a"}, None, "[CLS] w1 [SEP] w2 [SEP]"),
    ({"x": "w1", "sentence2": "w3", "sentence1": "w2", "label": "a"}, None,
     "[CLS] w2 [SEP] w3 [SEP]"),
    ({"x": "w1", "y": "w2", "label": "a"}, "y", "[CLS] w2 [SEP]"),
    ({"x": "w1", "y": "w2", "label": "a"}, "y, x", "[CLS] w2 [SEP] w1 [SEP]"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "named", "expected"), COLUMNS)
def test_the_columns_with_text(row, named, expected):
    data = encode("sequence-classification", [row], ("a",), text_column_names=named)
    assert texts(data, 0) == expected


def test_the_class_may_be_in_another_column():
    rows = [{"text": "w1", "kind": 1}]
    data = encode("sequence-classification", rows, ("0", "1"), label_column_name="kind")
    assert data.columns["labels"] == [1]


CLASSIFICATION = [
    (
        [{"label": 1}],
        {},
        r"row 0 has no column with text \(it has \['label'\]\); say which by --text",
    ),
    ([{"text": "w1"}], {}, "row 0 has no column 'label'"),
    (
        [{"text": "w1", "label": 0}],
        {"text_column_names": "a,b,c"},
        "names 3 columns, a model takes",
    ),
    ([{"text": "w1", "label": 0}, {"text": 3, "label": 0}], {}, "row 1: 'text' is a int"),
]


@pytest.mark.parametrize(("rows", "options", "message"), CLASSIFICATION)
def test_classification_refuses(rows, options, message):
    with pytest.raises(DatasetError, match=message):
        encode("sequence-classification", rows, ("0",), **options)


def test_an_unknown_class_is_refused():
    rows = [{"text": "w1", "label": label} for label in "ac"]
    with pytest.raises(DatasetError, match=r"row 1 has label 'c', the classes are \('a', 'b'\)"):
        encode("sequence-classification", rows, ("a", "b"))


# ---------------------------------------------------------------- token classification


def test_a_label_stands_at_the_first_token_of_its_word():
    row = {"tokens": ["w1", "xyz", "ab"], "ner_tags": ["O", "B-PER", "I-PER"]}
    data = encode("token-classification", [row], ("B-PER", "I-PER", "O"))
    assert texts(data, 0) == "[CLS] w1 x ##y ##z a ##b [SEP]"
    assert data.columns["labels"][0][:8] == [NO, 2, 0, NO, NO, 1, NO, NO]
    assert data.columns["labels"][0][8:] == [NO] * 8


def test_tokenizers_that_see_spaces_get_one_before_every_word(tmp_path):
    letters = sorted(ByteLevel.alphabet())
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    RobertaConfig().save_pretrained(tmp_path)
    task = TASKS["token-classification"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, **task.tokenizer_options)
    row = {"tokens": ["ab", "c"], "ner_tags": ["O", "B-PER"]}
    setup = setup_for(task.name, ("B-PER", "O"), tokenizer=tokenizer, max_seq_length=8)
    data = task.encode([row], setup)
    tokens = tokenizer.convert_ids_to_tokens(data.columns["input_ids"][0])
    assert tokens[:7] == ["<s>", "\u0120", "a", "b", "\u0120", "c", "</s>"]
    assert data.columns["labels"][0] == [NO, 1, NO, NO, 0, NO, NO, NO]


def test_words_behind_the_length_are_cut(caplog):
    row = {"tokens": ["w1"] * 30, "ner_tags": ["O"] * 30}
    data = encode("token-classification", [row], ("O",))
    assert data.columns["labels"][0] == [NO, *[0] * 14, NO]
    assert "1 of 1 sequences are longer than max_seq_length 16 and were cut" in caplog.text


def test_columns_of_words_are_named_or_the_first_two():
    row = {"words": ["w1"], "pos": ["X"], "chunk": ["Y"]}
    assert encode("token-classification", [row], ("X", "Y")).columns["labels"][0][1] == 0
    data = encode("token-classification", [row], ("X", "Y"), label_column_name="chunk")
    assert data.columns["labels"][0][1] == 1


TOKENS = [
    ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "row 0 has 2 words and 1 labels; give every word"),
    ({"tokens": [], "ner_tags": []}, r"row 0 is not a list of words, but \[\]; remove or split it"),
    ({"tokens": [1], "ner_tags": ["O"]}, r"row 0 is not a list of words, but \[1\]"),
    ({"tokens": "a b", "ner_tags": ["O"]}, "row 0: 'tokens' is a str, it has to be list"),
    ({"tokens": ["a"]}, "row 0 has no column 'ner_tags'"),
]


@pytest.mark.parametrize(("row", "message"), TOKENS)
def test_token_classification_refuses(row, message):
    with pytest.raises(DatasetError, match=message):
        encode("token-classification", [row], ("O",))


# ---------------------------------------------------------------- multiple choice


def test_every_choice_is_a_pair_of_context_and_ending():
    row = {"sent1": "w1", "sent2": "w2", "ending0": "w3", "ending1": "w4", "label": "1"}
    data = encode("multiple-choice", [row, row | {"label": 0, "sent2": ""}])
    assert [len(data.columns["input_ids"]), len(data.columns["input_ids"][0])] == [2, 2]
    decode = make_tokenizer().decode
    shown = [[decode(ids).replace("[PAD]", "").strip() for ids in row["input_ids"]] for row in data]
    assert shown[0] == ["[CLS] w1 [SEP] w2 w3 [SEP]", "[CLS] w1 [SEP] w2 w4 [SEP]"]
    assert shown[1][0] == "[CLS] w1 [SEP] w3 [SEP]"
    assert data.columns["labels"] == [1, 0]


RIGHT = {"sent1": "w1", "sent2": "w2", "ending0": "w3", "ending1": "w4", "label": 0}
CHOICES = [
    ([RIGHT, RIGHT | {"ending2": "w5"}], "the rows have 2, 3 choices; every one needs the same"),
    ([{"sent1": "w1", "sent2": "w2", "label": 0}], "the rows have 0 choices"),
    ([RIGHT | {"label": 2}], "row 0: 'label' is 2; it has to be a number from 0 to 1"),
    ([RIGHT | {"label": "b"}], "row 0: 'label' is 'b'; it has to be a number"),
    ([RIGHT | {"label": -1}], "row 0: 'label' is -1"),
    ([{k: v for k, v in RIGHT.items() if k != "sent1"}], "row 0 has no column 'sent1'"),
]


@pytest.mark.parametrize(("rows", "message"), CHOICES)
def test_multiple_choice_refuses(rows, message):
    with pytest.raises(DatasetError, match=message):
        encode("multiple-choice", rows)


# ---------------------------------------------------------------- masked language modelling


def test_text_is_cut_into_full_sequences():
    rows = [{"text": "w1 w2 w3"}, {"text": "  "}, {"text": "w4 w5 w6 w7 w8 w9"}]
    data = encode("masked-lm", rows, max_seq_length=6)
    assert [texts(data, i) for i in range(2)] == [
        "[CLS] w1 w2 w3 [SEP] [CLS]",
        "w4 w5 w6 w7 w8 w9",
    ]
    assert len(data) == 2  # the last [SEP] is the rest that is left out


def test_or_every_line_is_a_sequence():
    rows = [{"x": "w1 w2 w3"}, {"x": ""}, {"x": "w4"}]
    data = encode("masked-lm", rows, line_by_line=True, text_column_name="x")
    assert [texts(data, i) for i in range(2)] == ["[CLS] w1 w2 w3 [SEP]", "[CLS] w4 [SEP]"]
    assert texts(encode("masked-lm", rows, line_by_line=True), 1) == "[CLS] w4 [SEP]"
    unpadded = encode("masked-lm", rows, line_by_line=True, pad_to_max_length=False)
    assert [len(ids) for ids in unpadded.columns["input_ids"]] == [5, 3]


TEXTS = [
    ([{"text": " "}], {}, "column 'text' holds no text; pass a file with some"),
    ([{"text": "w1"}], {}, "the text has 3 tokens, one sequence takes 16; lower --max_seq_length"),
    ([{"text": ["w1"]}], {}, "row 0: 'text' is a list, it has to be str"),
    ([{"text": "w1"}], {"text_column_name": "x"}, "row 0 has no column 'x'"),
]


@pytest.mark.parametrize(("rows", "options", "message"), TEXTS)
def test_masked_lm_refuses(rows, options, message):
    with pytest.raises(DatasetError, match=message):
        encode("masked-lm", rows, **options)


@pytest.mark.parametrize("share", [0, 1.5])
def test_the_share_of_hidden_tokens_is_one(share):
    with pytest.raises(ValueError, match="mlm_probability must be above 0 and at most 1, got"):
        TASKS["masked-lm"].options(mlm_probability=share)


# ---------------------------------------------------------------- pretraining

STORIES = [f"w{i} w{i} w{i}" for i in range(5)], [f"good w{i}" for i in range(5)]


def pairs_of(data, label="next_sentence_label"):
    """Return the sentences of both segments and the label."""
    found = []
    for i in range(len(data)):
        first, second = (
            texts(data, i).removeprefix("[CLS] ").removesuffix(" [SEP]").split(" [SEP] ")
        )
        found.append((first, second, data.columns[label][i]))
    return found


def follows(first, second):
    """Whether the second segment goes on where the first one ends, in one of the stories."""
    return any(f"{first} {second}" in " ".join(story) for story in STORIES)


@pytest.mark.parametrize("as_lists", [False, True])
def test_a_pair_follows_or_comes_from_elsewhere(as_lists):
    rows = [{"text": list(story)} for story in STORIES * 10]
    if not as_lists:
        rows = [{"text": s} for story in STORIES * 10 for s in (*story, "")]
    pairs = pairs_of(encode("pretraining", rows, max_seq_length=24))
    assert {label for _, _, label in pairs} == {0, 1}
    for first, second, label in pairs:
        if label == 0:
            assert follows(first, second)
    strange = [pair for pair in pairs if pair[2] == 1 and not follows(*pair[:2])]
    assert len(strange) > len(pairs) / 4
    assert len(strange) < len(pairs) * 3 / 4


def test_the_same_text_gives_the_same_pairs():
    rows = [{"text": list(story)} for story in STORIES * 3]
    first, second = (encode("pretraining", rows, max_seq_length=24) for _ in range(2))
    assert first.columns == second.columns


def test_segments_fill_the_sequence_and_every_sentence_is_used():
    rows = [{"text": list(story)} for story in STORIES]
    data = encode("pretraining", rows, max_seq_length=24, nsp_probability=0)
    pairs = pairs_of(data)
    assert {label for _, _, label in pairs} == {0}
    assert pairs[0][0] + " " + pairs[0][1] == " ".join(STORIES[0])
    assert pairs[1][0] + " " + pairs[1][1] == " ".join(STORIES[1])


def test_models_that_learn_the_order_get_both_segments_of_one_text():
    rows = [{"text": list(story)} for story in STORIES]
    setup = setup_for("pretraining", pair_label="sentence_order_label", max_seq_length=24,
                      nsp_probability=1.0)  # fmt: skip
    pairs = pairs_of(TASKS["pretraining"].encode(rows, setup), "sentence_order_label")
    assert {label for _, _, label in pairs} == {1}
    assert all(follows(second, first) for first, second, _ in pairs)


def test_pretraining_refuses_a_model_without_pairs_and_a_single_text():
    rows = [{"text": ["w1", "w2"]}]
    with pytest.raises(ValueError, match="this model learns nothing about pairs of sentences; use"):
        TASKS["pretraining"].encode(rows, setup_for("pretraining", pair_label=None))
    with pytest.raises(DatasetError, match="the text has 1 documents, at least 2 are needed and"):
        encode("pretraining", rows)
    with pytest.raises(DatasetError, match="the text has 2 documents, at least 2 are needed and"):
        encode("pretraining", [{"text": "w1"}, {"text": ""}, {"text": "w2"}])


def test_a_document_is_a_list_of_texts():
    for wrong in ([1], [["w1"]], [None]):
        with pytest.raises(DatasetError, match=r"row 1: 'text' lists a .*; write a document as a"):
            encode("pretraining", [{"text": ["w1", "w2"]}, {"text": wrong}])


def test_two_long_texts_are_cut_before_they_are_paired():
    """Tokenizers keep every pair of what they cut off: here 900 pieces of either, 810,000."""
    long = [" ".join(f"w{number % 9}" for number in range(count)) for count in (9000, 9001)]
    setup = setup_for("sequence-classification")
    encoded = setup.tokenise([long[0], "w1"], [long[1], "w2"])
    short = setup.tokenise([" ".join(long[0].split()[:99]), "w1"], [long[1][:200], "w2"])
    assert encoded["input_ids"] == short["input_ids"]
    assert len(encoded.encodings[0].overflowing) < 100


def test_the_share_of_strange_pairs_is_one():
    with pytest.raises(ValueError, match=r"nsp_probability must be within 0 and 1, got -0\.1"):
        TASKS["pretraining"].options(nsp_probability=-0.1)


# ---------------------------------------------------------------- all of them


def test_needs_a_fast_tokenizer_of_enough_tokens():
    with pytest.raises(
        ValueError, match="str is not a fast tokenizer, so it cannot say which word"
    ):
        setup_for("masked-lm", tokenizer="slow")
    with pytest.raises(ValueError, match="max_seq_length 65 exceeds the 64 tokens that the model"):
        setup_for("masked-lm", max_seq_length=65)
    with pytest.raises(ValueError, match="max_seq_length must be at least 4, got 3"):
        TASKS["masked-lm"].options(max_seq_length=3)


@pytest.mark.parametrize("name", TASKS)
def test_without_padding_a_batch_is_as_long_as_its_longest_sample(name):
    rows = make_rows(name, 12)
    options = {"max_seq_length": 60, "pad_to_max_length": False}
    if name == "masked-lm":
        options["line_by_line"] = True
    task = TASKS[name]
    labels = ()
    if task.labels_of is not None:
        labels = tuple(sorted(set(task.labels_of(rows, task.options(**options)))))
    setup = setup_for(name, labels, **options)
    data = task.encode(rows, setup)
    batch = task.collator(setup)([data[i] for i in range(len(data))])
    flat = [ids for sample in data.columns["input_ids"]
            for ids in (sample if name == "multiple-choice" else [sample])]  # fmt: skip
    longest = max(len(ids) for ids in flat)
    assert batch["input_ids"].shape[-1] == longest < 60
    assert batch["attention_mask"].sum() == sum(len(ids) for ids in flat)
