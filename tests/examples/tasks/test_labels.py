"""Which classes there are, in which order, and what cannot be a class."""

import pytest

from ipu_pipeline.errors import DatasetError
from tasks.labels import choose_classes, class_name, label_config, order_classes


def test_numbers_are_ordered_by_value_and_names_alphabetically():
    assert order_classes(["10", "9", "9", "0"]) == ("0", "9", "10")
    assert order_classes(["b", "10", "a"]) == ("10", "a", "b")


def test_training_data_decides_unless_the_model_knows_all_classes():
    names = {"train": ["b", "a"], "validation": ["c"]}
    assert choose_classes(names) == ("a", "b")
    assert choose_classes(names, {"LABEL_0": 0, "LABEL_1": 1}) == ("a", "b")
    assert choose_classes(names, {"c": 0, "b": 1, "a": 2, "d": 3}) == ("c", "b", "a", "d")
    assert choose_classes({"validation": ["c"]}, {"d": 1, "c": 0}) == ("c", "d")


def test_a_model_that_knows_other_classes_cannot_be_evaluated():
    with pytest.raises(DatasetError, match="the data has classes a, b and the model knows x; eval"):
        choose_classes({"validation": ["b", "a"]}, {"x": 0})
    with pytest.raises(DatasetError, match=r"classes 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. and the model"):
        choose_classes({"validation": map(str, range(20))}, {})


def test_one_class_teaches_nothing():
    with pytest.raises(DatasetError, match="the training data has one class only, a; nothing can"):
        choose_classes({"train": ["a", "a"]})


@pytest.mark.parametrize(
    ("value", "name"),
    [("x", "x"), (0, "0"), (7, "7"), (True, "True"), ("2.0", "2.0"), ("v1.5", "v1.5")],
)
def test_names_and_numbers_are_classes(value, name):
    assert class_name(value, "row 0") == name


@pytest.mark.parametrize("value", [-1, 0.5, None, "", [1], "-1", "0.5", "3.250"])
def test_other_values_are_no_classes(value):
    with pytest.raises(DatasetError, match=r"row 2 has label .*; a class is a name or a number"):
        class_name(value, "row 2")


def test_what_a_configuration_says():
    assert label_config(()) == {}
    assert label_config(("a", "b")) == {
        "num_labels": 2,
        "id2label": {0: "a", 1: "b"},
        "label2id": {"a": 0, "b": 1},
    }
